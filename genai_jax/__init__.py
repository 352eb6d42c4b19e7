"""Generative models in pure JAX: one sharded training step for every family.

In Python, `load` opens a trained run and `train` trains one; `compare`, `study`, `ladder`, `fit`
and `compile_check` are about several runs, or about one that is still to come; `model_card` and
`train_tokenizer` are the commands of these names. docs/python.md shows them. Each module of this
package with a `main` is a command: `python -m genai_jax.train --help`. What a family consists of is
in `genai_jax.tasks.protocol`; README.md has everything else.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genai_jax.compare import compare as compare
    from genai_jax.compile_check import compile_check as compile_check
    from genai_jax.errors import ConfigError as ConfigError
    from genai_jax.fit import fit as fit
    from genai_jax.ladder import ladder as ladder
    from genai_jax.model_card import model_card as model_card
    from genai_jax.runs import Run as Run
    from genai_jax.runs import load as load
    from genai_jax.runs import train as train
    from genai_jax.study import study as study
    from genai_jax.train_tokenizer import train_tokenizer as train_tokenizer
    from genai_jax.training.own_step import make_step as make_step
    from genai_jax.training.workdir import environment as environment

__version__ = "0.2.0"

# Name -> the module that has it. They are imported when they are used: jax takes seconds.
_PLACES = {
    "ConfigError": "genai_jax.errors",
    "Run": "genai_jax.runs",
    "environment": "genai_jax.training.workdir",
    "load": "genai_jax.runs",
    "make_step": "genai_jax.training.own_step",
}
# Commands whose modules are callable.
_COMMANDS = (
    "compare", "compile_check", "fit", "ladder", "model_card", "study", "train", "train_tokenizer",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _COMMANDS:
        return importlib.import_module(f"genai_jax.{name}")
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES, *_COMMANDS])
