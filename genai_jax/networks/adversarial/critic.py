"""Critics of images: blocks that halve the size, and one verdict on the whole image.

Labels enter by projection (Miyato and Koyama 2018): the dot product of the image's features with an
embedding of each label is added to the verdict. There are no norms, since they do not go well with
gradient penalties and with mixed batches of real and fake images.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from genai_jax.config import field
from genai_jax.networks.adversarial.growth import channels_at, heights_of
from genai_jax.networks.layers.convolution import Conv, downsample
from genai_jax.networks.layers.dense import Dense
from genai_jax.outside import outside_name

NETWORKS = ("dcgan", "residual")


@dataclasses.dataclass(frozen=True)
class CriticConfig:
    network: str = field("dcgan", "Kind of blocks.", choices=NETWORKS, outside=outside_name)
    base_height: int = field(4, "Height of the last block's output.", minimum=1)
    channels: int = field(32, "Channels at full size; they double at each halving.", minimum=4)
    max_channels: int = field(512, "Largest number of channels at any size.", minimum=4)
    spectral_norm: bool = field(False, "Divide kernels by their largest singular value.")
    minibatch_std: bool = field(
        False, "Give the standard deviation over the batch to the last layers as a channel."
    )

    def check_shape(self, shape: tuple[int, ...], grows: bool = False):
        """Raises ValueError if halving does not lead from images (*space, channels) to the base."""
        heights_of(shape, self.base_height, grows)


class CriticBlock(nn.Module):
    """Halves the size: a strided convolution, or two with mean pooling and a 1x1 skip path."""

    features: int
    residual: bool
    spectral_norm: bool
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        space = x.ndim - 2
        halve = (2,) * space

        def conv(x, features, size, name, strides=None):
            return Conv(
                features, (size,) * space, strides, spectral_norm=self.spectral_norm,
                dtype=self.dtype, name=name,
            )(x)  # fmt: skip

        if not self.residual:
            return nn.leaky_relu(conv(x, self.features, 4, "conv", halve), 0.2)
        h = nn.leaky_relu(conv(x, x.shape[-1], 3, "conv_in"), 0.2)
        h = nn.leaky_relu(downsample(conv(h, self.features, 3, "conv_out"), halve), 0.2)
        return (h + conv(downsample(x, halve), self.features, 1, "skip")) * 0.5**0.5


class Critic(nn.Module):
    """Maps images to verdicts; higher means more real.

    Layers are named after their height, like those of `generator.Generator`.

    Attributes:
      shape: (*space, channels) of an image.
      label_sizes: number of values of each attribute to condition on; empty for none.
      grows: whether the first block is faded in, blended with the downsampled input of the next.

    Raises:
      ValueError: halving the size does not lead to the base height.
    """

    config: CriticConfig
    shape: tuple[int, ...]
    label_sizes: tuple[int, ...] = ()
    grows: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, labels: jax.Array | None = None, fade: jax.Array | float = 1.0
    ) -> jax.Array:
        """[batch, *space, channels] -> verdicts [batch], float32.

        Args:
          x: images in [-1, 1].
          labels: [batch, attributes].
          fade: weight of the first block, if the critic grows.
        """
        c, space = self.config, x.ndim - 2
        halve = (2,) * space
        heights = heights_of(self.shape, c.base_height, self.grows)[::-1]
        widths = [channels_at(h, heights[0], c.channels, c.max_channels) for h in heights]
        shared = dict(spectral_norm=c.spectral_norm, dtype=self.dtype)

        def from_image(x, i):
            layer = Conv(widths[i], (1,) * space, name=f"from_image_{heights[i]}", **shared)
            return nn.leaky_relu(layer(x), 0.2)

        small = from_image(downsample(x, halve), 1) if self.grows else None
        h = from_image(x, 0)
        for i, height in enumerate(heights[:-1]):
            block = CriticBlock(
                widths[i + 1], c.network == "residual", **shared, name=f"block_{height}"
            )
            h = block(h)
            if i == 0 and self.grows:
                h = (1 - fade) * small + fade * h
        if c.minibatch_std:
            h = _with_spread(h)
        last = Conv(widths[-1], (3,) * space, name="conv_last", **shared)
        h = nn.leaky_relu(last(h), 0.2).reshape(x.shape[0], -1)
        features = Dense((widths[-1],), use_bias=True, name="features", **shared)(h)
        features = nn.leaky_relu(features, 0.2)
        # In float32, like losses: rounding must not make similar verdicts equal.
        features, shared = features.astype(jnp.float32), dict(spectral_norm=c.spectral_norm)
        verdict = Dense((1,), use_bias=True, name="verdict", **shared)(features)[:, 0]
        for i, size in enumerate(self.label_sizes):
            table = Dense((widths[-1],), name=f"embedding_{i}", **shared)
            verdict += jnp.sum(table(jax.nn.one_hot(labels[:, i], size)) * features, -1)
        return verdict


def _with_spread(x: jax.Array) -> jax.Array:
    """Appends a channel with the mean standard deviation over the batch (Karras et al. 2018)."""
    spread = jnp.sqrt(jnp.var(x.astype(jnp.float32), 0) + 1e-8)
    plane = jnp.broadcast_to(jnp.mean(spread), (*x.shape[:-1], 1)).astype(x.dtype)
    return jnp.concatenate([x, plane], -1)


# Parameter path -> logical axes; the first pattern that matches applies.
PARTITION_RULES = (
    (r"(block_\d+/\w+|conv_last|from_image_\d+)/kernel", (..., None, "features")),
    (r"features/kernel", (None, "mlp")),
    (r"verdict/kernel", (None, None)),
    (r"embedding_\d+/kernel", (None, None)),
    (r"bias$", (None,)),
)
