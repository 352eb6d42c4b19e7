"""Convolutional autoencoders of signals, images and video (as in Rombach et al. 2022, appendix G).

The spatial size halves from level to level; time is never strided. The blocks of a level are
identical, so they can run in a loop. What happens to the latents between encoder and decoder is up
to the caller.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from genai_jax.config import field
from genai_jax.networks.image import attention
from genai_jax.networks.image.attention import Attention
from genai_jax.networks.layers.convolution import Conv, GroupNorm, upsample

LATENTS = ("kl", "vq", "rvq", "fsq")


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Shapes and choices of an autoencoder."""

    latent: str = field(
        "kl",
        "Kind of latents: Gaussian (kl), one codebook (vq), residual codebooks (rvq), or finite "
        "scalar quantization (fsq).",
        choices=LATENTS,
    )
    latent_channels: int = field(4, "Channels of the latents.", minimum=1)
    channels: int = field(32, "Channels at full resolution.", minimum=4)
    channel_multipliers: str = field(
        "1,2", "Channels of each level as multiples of `channels`, comma-separated."
    )
    blocks_per_level: int = field(
        1, "Residual blocks per level, in the encoder and in the decoder.", minimum=1
    )
    attention: bool = field(False, "Use attention at the lowest level.")
    head_dim: int = field(32, "Width of an attention head.", minimum=1)
    scan_blocks: bool = field(
        False, "Compile one block per level and run it in a loop; slow on CPUs."
    )
    remat: bool = field(False, "Recompute the blocks in the backward pass to save memory.")

    def __post_init__(self):
        multipliers = self.channel_multipliers.split(",")
        if not all(m.strip().isdigit() and int(m) for m in multipliers):
            raise ValueError(
                f"channel_multipliers={self.channel_multipliers} is not a comma-separated list of "
                "positive integers"
            )
        if self.attention and self.level_channels[-1] % self.head_dim:
            raise ValueError(
                f"head_dim={self.head_dim} does not divide the {self.level_channels[-1]} channels "
                "of the lowest level"
            )

    @property
    def level_channels(self) -> tuple[int, ...]:
        return tuple(self.channels * int(m) for m in self.channel_multipliers.split(","))

    def shrinkage(self, space: int) -> tuple[int, ...]:
        """The factors by which the latents are smaller along each of `space` spatial axes."""
        factor = 2 ** (len(self.level_channels) - 1)
        return (1, factor, factor)[-space:]

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """(*space, channels) of an image -> (*latent space, latent_channels).

        Raises:
          ValueError: the strides do not divide a size.
        """
        *space, _ = shape
        factors = self.shrinkage(len(space))
        if any(n % f for n, f in zip(space, factors, strict=True)):
            raise ValueError(
                f"size {'x'.join(map(str, space))} is not a multiple of "
                f"{'x'.join(map(str, factors))}, as the {len(self.level_channels)} levels of "
                f"channel_multipliers={self.channel_multipliers} require"
            )
        return *(n // f for n, f in zip(space, factors, strict=True)), self.latent_channels


class Block(nn.Module):
    """A residual block of two convolutions, initially the identity."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        channels, kernel = x.shape[-1], (3,) * (x.ndim - 2)
        conv = lambda name, scale: Conv(
            channels, kernel, init_scale=scale, dtype=self.dtype, name=name
        )
        h = nn.silu(GroupNorm(dtype=self.dtype, name="norm_in")(x))
        h = nn.silu(GroupNorm(dtype=self.dtype, name="norm_out")(conv("conv_in", 1.0)(h)))
        x = x + conv("conv_out", 0.0)(h)
        return nn.with_logical_constraint(
            x, ("batch", *(None,) * (x.ndim - 2), "activation_embed")
        ), None


class Level(nn.Module):
    """The blocks of one level; if there are several, parameters are stacked as [blocks, ...]."""

    config: AutoencoderConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        block = nn.remat(Block, prevent_cse=False) if self.config.remat else Block
        length = self.config.blocks_per_level
        if length == 1:  # XLA's CPU convolutions are slow in any loop, even one that runs once
            return block(self.dtype, name="block")(x)[0]
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=length,
            unroll=1 if self.config.scan_blocks else length,
        )
        return blocks(self.dtype, name="blocks")(x)[0]


class Middle(nn.Module):
    """Attention between all positions of an image, or of each frame of a video."""

    head_dim: int
    backend: str = "auto"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        images = x.shape[0] * (x.shape[1] if x.ndim == 5 else 1)
        tokens = GroupNorm(dtype=self.dtype, name="norm_in")(x).reshape(images, -1, channels)
        attend = Attention(
            channels // self.head_dim, self.head_dim, out_scale=0.0, backend=self.backend,
            dtype=self.dtype, name="attention",
        )  # fmt: skip
        return x + attend(tokens).reshape(x.shape)


class Encoder(nn.Module):
    """[batch, *space, channels] -> [batch, *latent space, features], float32."""

    config: AutoencoderConfig
    features: int
    backend: str = "auto"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        c.latent_shape(x.shape[1:])  # raises ValueError if the strides do not divide the size
        kernel, strides = (3,) * (x.ndim - 2), (1, 2, 2)[2 - x.ndim :]
        conv = lambda features, name, **kw: Conv(
            features, kernel, dtype=self.dtype, name=name, **kw
        )
        x = conv(c.level_channels[0], "conv_in")(x)
        for i, channels in enumerate(c.level_channels):
            if i:
                x = conv(channels, f"down_{i}", strides=strides)(x)
            x = Level(c, self.dtype, name=f"level_{i}")(x)
        if c.attention:
            x = Middle(c.head_dim, self.backend, self.dtype, name="middle")(x)
        x = nn.silu(GroupNorm(dtype=self.dtype, name="norm_out")(x))
        return conv(self.features, "conv_out")(x).astype(jnp.float32)


class Decoder(nn.Module):
    """[batch, *latent space, latent_channels] -> features [batch, *space, channels]."""

    config: AutoencoderConfig
    backend: str = "auto"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        c = self.config
        kernel, factors = (3,) * (z.ndim - 2), (1, 2, 2)[2 - z.ndim :]
        conv = lambda features, name: Conv(features, kernel, dtype=self.dtype, name=name)
        x = conv(c.level_channels[-1], "conv_in")(z)
        if c.attention:
            x = Middle(c.head_dim, self.backend, self.dtype, name="middle")(x)
        for i in reversed(range(len(c.level_channels))):
            x = Level(c, self.dtype, name=f"level_{i}")(x)
            if i:
                x = conv(c.level_channels[i - 1], f"up_{i}")(upsample(x, factors))
        return nn.silu(GroupNorm(dtype=self.dtype, name="norm_out")(x))


class Autoencoder(nn.Module):
    """An encoder and a decoder, whose last layer is separate for adaptive loss weights.

    Attributes:
      space: number of spatial axes of the data.
      channels: channels of the data.
    """

    config: AutoencoderConfig
    space: int
    channels: int
    backend: str = "auto"
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        c = self.config
        features = c.latent_channels * (2 if c.latent == "kl" else 1)
        self.encoder = Encoder(c, features, self.backend, self.dtype)
        self.decoder = Decoder(c, self.backend, self.dtype)
        self.last = Conv(self.channels, (3,) * self.space, dtype=self.dtype)

    def encode(self, x: jax.Array) -> jax.Array:
        """[batch, *space, channels] -> latents [batch, *latent space, latent_channels], float32.

        For Gaussian latents, mean and log-variance: [batch, *latent space, 2 latent_channels].

        Raises:
          ValueError: the strides do not divide a size.
        """
        return self.encoder(x)

    def hidden(self, z: jax.Array) -> jax.Array:
        """[batch, *latent space, latent_channels] -> input of the last layer."""
        return self.decoder(z)

    def output(self, hidden: jax.Array) -> jax.Array:
        """Applies the last layer: -> [batch, *space, channels], float32."""
        return self.last(hidden).astype(jnp.float32)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Encodes and decodes without sampling or quantization; used by `init`."""
        return self.output(self.hidden(self.encode(x)[..., : self.config.latent_channels]))


_BLOCK = (
    *attention.PARTITION_RULES,
    (r"norm\w*/(scale|bias)", ("embed",)),
)

# Parameter path -> logical axes; the first pattern that matches applies. Kernels have leading axes
# for space and, if stacked, for blocks.
PARTITION_RULES = (
    (r"level_\d+/.*kernel", (..., None, "features")),
    (r"level_\d+/blocks/.*(scale|bias)", ("blocks", "embed")),
    (r"level_\d+/block/.*(scale|bias)", ("embed",)),
    *((f"middle/.*{pattern}", axes) for pattern, axes in _BLOCK),
    (r"(down|up)_\d+/kernel", (..., None, "features")),
    (r"(down|up)_\d+/bias", ("embed",)),
    (r"conv_in/kernel", (..., None, "features")),
    (r"conv_in/bias", ("embed",)),
    (r"(encoder/conv_out|last)/kernel", (..., None, None)),
    (r"(encoder/conv_out|last)/bias", (None,)),
    (r"norm_out/(scale|bias)", ("embed",)),
)
