"""Flags of a text model that contradict each other."""

import jax
import jax.numpy as jnp

import kernels_pallas
from genai_jax.config import Config, ConfigError
from genai_jax.networks.sequence.config import TransformerConfig
from genai_jax.networks.sequence.mixers import ATTENTIONS, load_mixer


def check_positions(config: Config):
    """Raises `ConfigError` for rows that are longer than the positions that are learned."""
    shape, data = config.transformer, config.data
    for name in ("sequence_length", "held_out_length"):
        length = getattr(data, name) or 0
        if shape.positions == "learned" and length > shape.max_length:
            raise ConfigError(
                f"--data.{name}={length} is longer than the learned positions: "
                f"--transformer.max_length={shape.max_length}"
            )


def check_attention(
    config: Config, mask: kernels_pallas.Mask | None = None, length: int | None = None
):
    """Raises `ConfigError` if the chosen backend cannot run the attention of a step.

    Args:
      config: of the run.
      mask: of the attention; those of the mixers if None.
      length: tokens of a row; as many as the data has if None.
    """
    shape, data, backend = config.transformer, config.data, config.run.attention
    size = (data.batch_size, length or data.sequence_length)
    dtype = jnp.dtype(config.run.dtype)
    q, k = (
        jax.ShapeDtypeStruct((*size, heads, shape.head_width), dtype)
        for heads in (shape.num_heads, shape.kv_heads)
    )
    try:
        for seen, sinks in masks_of(shape) if mask is None else [(mask, 0)]:
            kernels_pallas.explain(q, k, k, backend=backend, mask=seen, return_lse=sinks > 0)
    except ValueError as error:
        raise ConfigError(f"--attention={backend}: {error}") from None


def masks_of(shape: TransformerConfig) -> list[tuple[kernels_pallas.Mask, int]]:
    """Mask and sinks of each attention among the mixers of a decoder; causal if there are none."""
    found = [load_mixer(name) for name in shape.mixers if name in ATTENTIONS]
    each = [(mixer.own_mask(shape), mixer.sinks_of(shape)) for mixer in found]
    return each or [(kernels_pallas.Causal(), 0)]
