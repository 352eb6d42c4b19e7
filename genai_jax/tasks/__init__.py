"""The families. Each is one class; its name here is what ``--task`` takes."""

from genai_jax.tasks.language_model import LanguageModel

TASKS = {"language_model": LanguageModel}
