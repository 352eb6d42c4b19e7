"""Generative models in pure JAX: one sharded training step for every family.

In Python, `load` opens a trained run and `train` trains one; docs/python.md shows both. Each module
of this package with a `main` is a command: `python -m genai_jax.train --help`. What a family
consists of is in `genai_jax.tasks.protocol`; README.md has everything else.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genai_jax.errors import ConfigError as ConfigError
    from genai_jax.runs import Run as Run
    from genai_jax.runs import load as load
    from genai_jax.runs import train as train
    from genai_jax.training.own_step import make_step as make_step

__version__ = "0.2.0"

# Name -> the module that has it. They are imported when they are used: jax takes seconds.
_PLACES = {
    "ConfigError": "genai_jax.errors",
    "Run": "genai_jax.runs",
    "load": "genai_jax.runs",
    "make_step": "genai_jax.training.own_step",
}


def __getattr__(name: str) -> Any:
    if name == "train":  # a command, and callable
        return importlib.import_module("genai_jax.train")
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES, "train"])
