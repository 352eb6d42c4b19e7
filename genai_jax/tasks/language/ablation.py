"""Attention heads without their output: what a language model can do without them."""

import re

import jax.numpy as jnp

from genai_jax.config import ConfigError
from genai_jax.errors import printable
from genai_jax.networks.sequence.config import TransformerConfig
from genai_jax.tasks.protocol import Params

Heads = tuple[tuple[int, int], ...]


def heads_of(text: str) -> Heads:
    """The (layer, head) pairs of a flag.

    Raises:
      ValueError: text of another form.
    """
    names = [name.strip() for name in text.split(",")] if text else []
    for name in names:
        if not re.fullmatch(r"\d{1,9}\.\d{1,9}", name, re.ASCII):
            raise ValueError(
                f"ablate={printable(text)} is not a list such as 0.1,1.0 of LAYER.HEAD pairs"
            )
    return tuple((int(layer), int(head)) for layer, head in (n.split(".") for n in names))


def without_heads(params: Params, config: TransformerConfig, heads: Heads) -> Params:
    """The parameters of a transformer in which these heads add nothing to the residual stream.

    Raises:
      ConfigError: a head that the network lacks.
    """
    places = len(config.mixers)
    for layer, head in heads:
        if layer >= config.num_layers or head >= config.num_heads:
            raise ConfigError(
                f"--ablate: the network lacks the head {layer}.{head}; layers are 0 to "
                f"{config.num_layers - 1}, heads 0 to {config.num_heads - 1}"
            )
        period, place = divmod(layer, places)
        if config.mixers[place] != "attention":
            raise ConfigError(
                f"--ablate: layer {layer} is the mixer {config.mixers[place]}, not attention"
            )
        path = ("layers", *(() if places == 1 else (f"block_{place}",)), "attention", "out")
        params = _changed(
            params, (*path, "kernel"), lambda k, at=(period, head): jnp.asarray(k).at[at].set(0)
        )
    return params


def _changed(tree: Params, path: tuple[str, ...], change) -> Params:
    if not path:
        return change(tree)
    return tree | {path[0]: _changed(tree[path[0]], path[1:], change)}
