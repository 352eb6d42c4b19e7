"""Mixers: the part of a block that moves information between the tokens of a sequence.

A mixer is a Flax module class that follows `protocol.Mixer`. The pattern of a network names its
mixers; each is imported when it is used. A name is one of `MIXERS`, or "module:Class" for a mixer
from outside this package.
"""

import importlib

from genai_jax.outside import is_outside, load_outside, snake_case

REQUIRED = ("PARTITION_RULES", "empty_state", "flops")  # of `protocol.Mixer`
MIXERS = {"attention": "genai_jax.networks.sequence.mixers.attention:Attention"}


def split_pattern(pattern: str | None) -> tuple[str, ...]:
    """The mixers of consecutive blocks, of one period; attention for None."""
    return ("attention",) if pattern is None else tuple(m.strip() for m in pattern.split(","))


def check_pattern(pattern: str | None, num_layers: int):
    """Raises `ValueError` for unknown mixers, or a period that does not divide the layers."""
    names = split_pattern(pattern)
    for name in names:
        if name not in MIXERS and not is_outside(name):
            raise ValueError(
                f"pattern={pattern} has the unknown mixer {name!r}; known: {', '.join(MIXERS)}, or "
                "module:Class for your own"
            )
    if num_layers % len(names):
        raise ValueError(
            f"num_layers={num_layers} is not divisible by the {len(names)} mixers of "
            f"pattern={pattern}"
        )


def outside_mixers(pattern: str | None) -> tuple[str, ...]:
    """The mixers of a pattern that are not part of this package: using them runs their code."""
    return tuple(name for name in split_pattern(pattern) if is_outside(name))


def load_mixer(name: str) -> type:
    """The class of a mixer.

    Raises:
      ConfigError: a mixer from outside that cannot be imported.
    """
    if name in MIXERS:
        module, _, attribute = MIXERS[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    return load_outside("--transformer.pattern", name, REQUIRED)


def parameter_name(name: str) -> str:
    """Name of a mixer in parameter paths: its own, or its class in snake case."""
    if name in MIXERS:
        return name
    return snake_case(name)
