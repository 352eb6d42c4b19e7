"""Critics of images: blocks that halve the size, and one verdict on the whole.

Classes are told by projection (Miyato and Koyama 2018): the verdict gains the product of the
image's features with an embedding of each label. There are no norms, which gradient penalties and
mixed batches of real and fake do not go with.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from genai_jax.config import field
from genai_jax.networks.adversarial.growth import channels_at, heights_of
from genai_jax.networks.layers.convolution import Conv, downsample
from genai_jax.networks.layers.dense import Dense

NETWORKS = ("dcgan", "residual")


@dataclasses.dataclass(frozen=True)
class CriticConfig:
    network: str = field("dcgan", "kind of the blocks", choices=NETWORKS)
    base_height: int = field(4, "height of the last block's output", minimum=1)
    channels: int = field(32, "at full size; twice as many at each halving", minimum=4)
    max_channels: int = field(512, "at any size", minimum=4)
    spectral_norm: bool = field(False, "divide kernels by their largest singular value")
    minibatch_std: bool = field(False, "show the spread of a batch to the last layers")


class CriticBlock(nn.Module):
    """Half the size: a strided convolution, or two with a mean and a 1x1 one beside them."""

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
    """Images to verdicts, the higher the more real.

    Layers are named after their height, as those of `generator.Generator`.

    Attributes:
      shape: (*space, channels) of an image.
      label_sizes: number of values of each attribute that it is told; empty: none.
      grows: whether the first block fades in, beside the input of the block after it.

    Raises:
      ValueError: sizes that halving does not lead to.
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
          fade: share of the first block, of a critic that grows.
        """
        c, space = self.config, x.ndim - 2
        halve = (2,) * space
        heights = heights_of(self.shape, c.base_height, "--critic.base_height", self.grows)[::-1]
        wide = [channels_at(h, heights[0], c.channels, c.max_channels) for h in heights]
        shared = dict(spectral_norm=c.spectral_norm, dtype=self.dtype)

        def seen(x, i):
            layer = Conv(wide[i], (1,) * space, name=f"from_image_{heights[i]}", **shared)
            return nn.leaky_relu(layer(x), 0.2)

        small = seen(downsample(x, halve), 1) if self.grows else None
        h = seen(x, 0)
        for i, height in enumerate(heights[:-1]):
            block = CriticBlock(
                wide[i + 1], c.network == "residual", **shared, name=f"block_{height}"
            )
            h = block(h)
            if i == 0 and self.grows:
                h = (1 - fade) * small + fade * h
        if c.minibatch_std:
            h = _with_spread(h)
        last = Conv(wide[-1], (3,) * space, name="conv_last", **shared)
        h = nn.leaky_relu(last(h), 0.2).reshape(x.shape[0], -1)
        features = Dense((wide[-1],), use_bias=True, name="features", **shared)(h)
        features = nn.leaky_relu(features, 0.2)
        # In float32, as a loss is: verdicts that differ little are not to be rounded to one.
        features, shared = features.astype(jnp.float32), dict(spectral_norm=c.spectral_norm)
        verdict = Dense((1,), use_bias=True, name="verdict", **shared)(features)[:, 0]
        for i, size in enumerate(self.label_sizes):
            table = Dense((wide[-1],), name=f"embedding_{i}", **shared)
            verdict += jnp.sum(table(jax.nn.one_hot(labels[:, i], size)) * features, -1)
        return verdict


def _with_spread(x: jax.Array) -> jax.Array:
    """Adds a channel with the mean standard deviation over the batch (Karras et al. 2018)."""
    spread = jnp.sqrt(jnp.var(x.astype(jnp.float32), 0) + 1e-8)
    plane = jnp.broadcast_to(jnp.mean(spread).astype(x.dtype), (*x.shape[:-1], 1))
    return jnp.concatenate([x, plane], -1)


# Parameter path -> logical axes. The first pattern found in the path decides.
PARTITION_RULES = (
    (r"(block_\d+/\w+|conv_last|from_image_\d+)/kernel", (..., None, "features")),
    (r"features/kernel", (None, "mlp")),
    (r"verdict/kernel", (None, None)),
    (r"embedding_\d+/kernel", (None, None)),
    (r"bias$", (None,)),
)
