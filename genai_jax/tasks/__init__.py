"""The families. Each is one class; its name here is what ``--task`` takes."""

from genai_jax.tasks.autoencoder.code_prior import CodePrior
from genai_jax.tasks.autoencoder.task import Autoencoder
from genai_jax.tasks.classification.images import ImageClassifier
from genai_jax.tasks.diffusion.few_step import FewStep
from genai_jax.tasks.diffusion.task import Diffusion
from genai_jax.tasks.energy.rbm import Rbm
from genai_jax.tasks.flow.task import NormalizingFlow
from genai_jax.tasks.gan.task import Gan
from genai_jax.tasks.language.causal import LanguageModel
from genai_jax.tasks.vae.task import Vae

TASKS = {
    "language_model": LanguageModel,
    "diffusion": Diffusion,
    "few_step": FewStep,
    "autoencoder": Autoencoder,
    "code_prior": CodePrior,
    "image_classifier": ImageClassifier,
    "vae": Vae,
    "gan": Gan,
    "normalizing_flow": NormalizingFlow,
    "rbm": Rbm,
}
