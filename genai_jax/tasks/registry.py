"""The families by name: what ``--task`` takes. A family is imported only when it is chosen."""

import difflib
import importlib

from genai_jax.config import ConfigError
from genai_jax.outside import is_outside, load_outside

TASKS = {
    "language_model": "genai_jax.tasks.language.causal:LanguageModel",
    "masked_language_model": "genai_jax.tasks.language.masked:MaskedLanguageModel",
    "discrete_diffusion": "genai_jax.tasks.language.discrete_diffusion:DiscreteDiffusion",
    "sequence_to_sequence": "genai_jax.tasks.language.sequence_to_sequence:SequenceToSequence",
    "diffusion": "genai_jax.tasks.diffusion.task:Diffusion",
    "few_step": "genai_jax.tasks.diffusion.few_step:FewStep",
    "autoencoder": "genai_jax.tasks.autoencoder.task:Autoencoder",
    "code_prior": "genai_jax.tasks.autoencoder.code_prior:CodePrior",
    "image_classifier": "genai_jax.tasks.classification.images:ImageClassifier",
    "vae": "genai_jax.tasks.vae.task:Vae",
    "gan": "genai_jax.tasks.gan.task:Gan",
    "normalizing_flow": "genai_jax.tasks.flow.task:NormalizingFlow",
    "rbm": "genai_jax.tasks.energy.rbm:Rbm",
    "ngram": "genai_jax.tasks.statistical.ngram:Ngram",
    "hmm": "genai_jax.tasks.statistical.hmm:Hmm",
    "neural_lm": "genai_jax.tasks.language.neural:NeuralLm",
    "word_vectors": "genai_jax.tasks.words.task:WordVectors",
    "responder": "genai_jax.tasks.statistical.responder:Responder",
}
REQUIRED = ("components", "init", "phases", "example_metrics")  # of `protocol.Task`


def task_class(name: str) -> type:
    """The class of a task: one of `TASKS`, or "my_package.my_module:MyTask".

    Raises:
      ConfigError: an unknown name, a module that cannot be imported, or a class that lacks a
        required attribute.
    """
    if name not in TASKS and not is_outside(name):
        near = difflib.get_close_matches(name, TASKS, n=1)
        raise ConfigError(
            f"--task={name} is not one of {', '.join(TASKS)}"
            f"{f' (did you mean {near[0]}?)' if near else ''}; name a task of your own by its "
            "class, as in --task=my_package.my_module:MyTask"
        )
    if name in TASKS:
        module_name, class_name = TASKS[name].split(":")
        return getattr(importlib.import_module(module_name), class_name)
    cls = load_outside("--task", name)
    if not isinstance(cls, type):
        raise ConfigError(f"--task={name} is not a class")
    missing = [m for m in REQUIRED if not _provides(cls, m)]
    if missing:
        raise ConfigError(f"--task={name} lacks {', '.join(missing)}, which every task has")
    from genai_jax.tasks.protocol import Task  # which imports jax

    if Task not in cls.__mro__:
        raise ConfigError(f"--task={name} is not a subclass of genai_jax.tasks.protocol.Task")
    return cls


def task_name(cls: type) -> str:
    """The name of a class in ``--task``."""
    where = f"{cls.__module__}:{cls.__qualname__}"
    return next((name for name, place in TASKS.items() if place == where), where)


def _provides(cls: type, name: str) -> bool:
    """Whether a class defines an attribute rather than only declaring it."""
    value = getattr(cls, name, None)
    return value is not None and not getattr(value, "__isabstractmethod__", False)
