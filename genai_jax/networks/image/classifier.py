"""A small residual convolutional network that classifies images, signals and video."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from genai_jax.config import field
from genai_jax.networks.layers.convolution import Conv, GroupNorm
from genai_jax.networks.layers.dense import Dense


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """Shapes of a classifier."""

    channels: int = field(
        32, "Channels at full resolution; they double in each later stage.", minimum=4
    )
    num_stages: int = field(
        3, "Number of stages; each after the first halves the resolution.", minimum=1
    )
    blocks_per_stage: int = field(1, "Residual blocks per stage.", minimum=1)
    feature_dim: int = field(64, "Width of the features before the logits.", minimum=1)
    dropout: float = field(0.1, "Dropout rate of the features.", minimum=0, maximum=1)


class Classifier(nn.Module):
    """Computes features, and logits for every attribute.

    Attributes:
      config: shapes.
      label_sizes: number of values of each attribute.
      dtype: dtype of the matmuls.
    """

    config: ClassifierConfig
    label_sizes: tuple[int, ...]
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """[batch, *space, channels] -> features [batch, feature_dim], logits [batch, size] of each.

        Both are float32. Dropout is active if there is an rng named "dropout".
        """
        c = self.config
        kernel = (3,) * (x.ndim - 2)
        x = Conv(c.channels, kernel, dtype=self.dtype, name="conv_in")(x)
        for stage in range(c.num_stages):
            channels = c.channels * 2**stage
            if stage:
                strides = (2,) * (x.ndim - 2)
                x = Conv(channels, kernel, strides, dtype=self.dtype, name=f"down_{stage}")(x)
            for i in range(c.blocks_per_stage):
                x = x + self._update(x, f"stage_{stage}_block_{i}")
        x = nn.silu(GroupNorm(dtype=self.dtype, name="norm_out")(x))
        # Besides the mean, keep coarse positions: the contrast of the two halves along every axis.
        pooled = jnp.concatenate([x.mean(tuple(range(1, x.ndim - 1))), _half_contrast(x)], -1)
        features = Dense((c.feature_dim,), use_bias=True, dtype=self.dtype, name="features")(pooled)
        features = nn.silu(features).astype(jnp.float32)
        dropped = nn.Dropout(c.dropout, deterministic=not self.has_rng("dropout"))(features)
        logits = tuple(
            Dense((size,), use_bias=True, name=f"label_{i}")(dropped)
            for i, size in enumerate(self.label_sizes)
        )
        return features, logits

    def _update(self, x, name):
        kernel = (3,) * (x.ndim - 2)
        for part in ("a", "b"):
            x = nn.silu(GroupNorm(dtype=self.dtype, name=f"{name}_norm_{part}")(x))
            x = Conv(x.shape[-1], kernel, dtype=self.dtype, name=f"{name}_conv_{part}")(x)
        return x


def _half_contrast(x: jax.Array) -> jax.Array:
    """Mean of the second half minus that of the first, for each axis: [batch, axes * channels]."""
    contrasts = []
    for axis in range(1, x.ndim - 1):
        size = x.shape[axis]
        weights = jnp.sign(jnp.arange(size) - (size - 1) / 2) / size
        other = tuple(a for a in range(1, x.ndim - 1) if a != axis)
        along = jnp.mean(x.astype(jnp.float32), other)
        contrasts.append(jnp.einsum("bnc,n->bc", along, weights))
    return jnp.concatenate(contrasts, -1).astype(x.dtype)


# Parameter path -> logical axes; kernels have leading axes for space.
PARTITION_RULES = (
    (r"conv_in/kernel", (..., None, "features")),
    (r"(down_\d+|conv_[ab])/kernel", (..., None, "features")),
    (r"features/kernel", ("embed", None)),
    (r"label_\d+/kernel", (None, None)),
    (r"/(scale|bias)", (None,)),
)
