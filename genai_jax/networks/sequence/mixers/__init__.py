"""Mixers: the part of a block that moves information between the tokens of a sequence.

A mixer is a Flax module class that follows `protocol.Mixer`. The pattern of a network names its
mixers; each is imported when it is used. A name is one of `MIXERS`, or "module:Class" for a mixer
from outside this package.
"""

import importlib
from collections.abc import Iterable
from typing import NamedTuple

from genai_jax.outside import is_outside, load_outside, snake_case

REQUIRED = ("PARTITION_RULES", "empty_state", "flops")  # of `protocol.Mixer`


class Entry(NamedTuple):
    """Where a mixer is, below this package, and the options of `TransformerConfig` that it has."""

    place: str
    options: tuple[str, ...] = ()


WIDE = ("expand", "state_dim", "conv_width")
OF_HEADS = ("attention_soft_cap", "num_kv_heads", "qk_norm")
OF_BLOCKS = ("block_size", "near_blocks", "block_stride")
# Options that only some mixers have.
OPTIONS = (
    *WIDE, "window", *OF_HEADS, "sinks", "dilation", *OF_BLOCKS, "latent_dim", "rotary_dim",
)  # fmt: skip
ATTENTIONS = ("attention", "dilated_attention", "block_sparse_attention")
MIXERS = {
    "attention": Entry("attention:Attention", ("window", *OF_HEADS, "sinks")),
    "dilated_attention": Entry(
        "sparse_attention:DilatedAttention", ("window", *OF_HEADS, "dilation")
    ),
    "block_sparse_attention": Entry(
        "sparse_attention:BlockSparseAttention", (*OF_HEADS, *OF_BLOCKS)
    ),
    "latent_attention": Entry(
        "latent_attention:LatentAttention",
        ("window", "attention_soft_cap", "latent_dim", "rotary_dim"),
    ),
    "s4": Entry("s4:S4", ("state_dim",)),
    "s4d": Entry("s4:S4d", ("state_dim",)),
    "mamba": Entry("mamba:Mamba", WIDE),
    "mamba2": Entry("mamba2:Mamba2", WIDE),
    "gated_linear_attention": Entry("linear_attention:GatedLinearAttention"),
    "gated_delta_rule": Entry("linear_attention:GatedDeltaRule", ("conv_width",)),
    "rg_lru": Entry("rg_lru:RgLru", ("expand", "conv_width")),
    "lstm": Entry("gated_cells:Lstm", ("expand",)),
    "gru": Entry("gated_cells:Gru", ("expand",)),
    "minimal_gru": Entry("gated_cells:MinimalGru", ("expand",)),
    "mlstm": Entry("mlstm:Mlstm", ("expand", "conv_width")),
    "liquid": Entry("gated_cells:Liquid", ("expand",)),
    **{f"dilated{2**i}": Entry(f"dilated:Dilated{2**i}", ("expand",)) for i in range(10)},
}


def options_of(names: Iterable[str]) -> set[str]:
    """The options that at least one of these mixers has; one from outside may use any."""
    found: set[str] = set()
    for name in names:
        found.update(MIXERS[name].options if name in MIXERS else OPTIONS)
    return found


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
        module, _, attribute = MIXERS[name].place.partition(":")
        return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
    return load_outside("--transformer.pattern", name, REQUIRED)


def parameter_name(name: str) -> str:
    """Name of a mixer in parameter paths: its own, or its class in snake case."""
    if name in MIXERS:
        return name
    return snake_case(name)
