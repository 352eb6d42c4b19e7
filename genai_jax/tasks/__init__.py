"""The families. Each is one class; its name here is what ``--task`` takes."""

from genai_jax.tasks.autoencoder import Autoencoder
from genai_jax.tasks.code_prior import CodePrior
from genai_jax.tasks.diffusion import Diffusion
from genai_jax.tasks.few_step import FewStep
from genai_jax.tasks.gan import Gan
from genai_jax.tasks.image_classifier import ImageClassifier
from genai_jax.tasks.language_model import LanguageModel
from genai_jax.tasks.normalizing_flow import NormalizingFlow
from genai_jax.tasks.rbm import Rbm
from genai_jax.tasks.vae import Vae

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
