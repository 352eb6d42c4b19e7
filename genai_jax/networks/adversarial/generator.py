"""Generators of images: latents to styles, and styles to images whose size doubles in every block.

There are three kinds of blocks: those of DCGAN (Radford et al. 2016, with group norm instead of
batch norm, so that an image does not depend on the rest of its batch), residual blocks whose norms
are modulated by the style (Brock et al. 2019), and modulated convolutions with noise inputs (Karras
et al. 2020, "Analyzing and improving the image quality of StyleGAN").
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from genai_jax.config import field
from genai_jax.networks.adversarial.growth import channels_at, heights_of
from genai_jax.networks.layers.convolution import Conv, GroupNorm, convolve, upsample
from genai_jax.networks.layers.dense import Dense, add_bias
from genai_jax.outside import outside_name

NETWORKS = ("dcgan", "residual", "style")


@dataclasses.dataclass(frozen=True)
class GeneratorConfig:
    network: str = field("dcgan", "Kind of blocks.", choices=NETWORKS, outside=outside_name)
    latent_dim: int = field(64, "Number of Gaussian latent variables.", minimum=1)
    base_height: int = field(4, "Height of the first block; the others double it.", minimum=1)
    channels: int = field(32, "Channels at full size; they double at each halving.", minimum=4)
    max_channels: int = field(512, "Largest number of channels at any size.", minimum=4)
    style_dim: int = field(128, "Width of a style, for style blocks.", minimum=1)
    mapping_layers: int = field(4, "Layers from latents to styles, for style blocks.", minimum=1)
    noise: bool = field(True, "Add noise at every position, for style blocks.")

    def __post_init__(self):
        style_only = {f.name: f.default for f in dataclasses.fields(self)[-3:]}
        for name, default in style_only.items():
            if self.network != "style" and getattr(self, name) != default:
                raise ValueError(
                    f"{name}={getattr(self, name)} is for network=style, not {self.network}"
                )

    def check_shape(self, shape: tuple[int, ...], grows: bool = False):
        """Raises ValueError if doubling the base does not lead to images (*space, channels)."""
        heights_of(shape, self.base_height, grows)


class DcganBlock(nn.Module):
    """Doubles the size, then convolution, norm and activation."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, style: jax.Array) -> jax.Array:
        x = upsample(x, (2,) * (x.ndim - 2))
        x = Conv(self.features, (3,) * (x.ndim - 2), dtype=self.dtype, name="conv")(x)
        return nn.relu(GroupNorm(dtype=self.dtype, name="norm")(x))


class ResidualBlock(nn.Module):
    """Doubles the size: two convolutions with a 1x1 skip path; the style modulates the norms."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, style: jax.Array) -> jax.Array:
        space, twice = x.ndim - 2, (2,) * (x.ndim - 2)

        def conv(x, name, size=3, scale=1.0):
            return Conv(
                self.features, (size,) * space, init_scale=scale, dtype=self.dtype, name=name
            )(x)

        h = upsample(nn.relu(self._norm(x, style, "in")), twice)
        h = nn.relu(self._norm(conv(h, "conv_in"), style, "out"))
        return conv(upsample(x, twice), "skip", 1) + conv(h, "conv_out")

    def _norm(self, x, style, name):
        modulation = Dense(
            (2 * x.shape[-1],), init_scale=0.1, dtype=self.dtype, name=f"style_{name}"
        )
        scale, bias = jnp.split(_over_space(modulation(style), x), 2, -1)
        x = GroupNorm(affine=False, dtype=self.dtype)(x)
        return x * (1 + scale) + bias


class ModulatedConv(nn.Module):
    """A convolution whose input channels are scaled by a style, with demodulated outputs.

    Equal to a convolution with a different kernel for each example, normalized per output channel
    (equations 1 and 3 of Karras et al. 2020); scaling inputs and outputs instead of the kernel
    allows a single convolution.
    """

    features: int
    kernel_size: int = 3
    demodulate: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, style: jax.Array) -> jax.Array:
        space, channels = x.ndim - 2, x.shape[-1]
        scales = Dense((channels,), name="style")(style.astype(jnp.float32)) + self.param(
            "style_bias", nn.initializers.ones, (channels,), jnp.float32
        )
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
        shape = (*(self.kernel_size,) * space, channels, self.features)
        kernel = self.param("kernel", init, shape, jnp.float32)
        x = (x * _over_space(scales, x)).astype(self.dtype)
        y = convolve(x, kernel.astype(self.dtype))
        if not self.demodulate:
            return y
        squares = jnp.sum(jnp.square(kernel), range(space))  # [channels, features]
        demodulation = jax.lax.rsqrt(jnp.square(scales) @ squares + 1e-8)
        return (y * _over_space(demodulation, y)).astype(self.dtype)


class StyleBlock(nn.Module):
    """Doubles the size unless it is the first block; modulated convolutions, noise and biases."""

    features: int
    first: bool
    noise: bool
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, style: jax.Array) -> jax.Array:
        if not self.first:
            x = upsample(x, (2,) * (x.ndim - 2))
        for i in range(1 if self.first else 2):
            x = ModulatedConv(self.features, dtype=self.dtype, name=f"conv_{i}")(x, style)
            if self.noise:
                strength = self.param(f"noise_{i}", nn.initializers.zeros, (), jnp.float32)
                x = (x + strength * self._noise(x)).astype(self.dtype)
            bias = self.param(f"bias_{i}", nn.initializers.zeros, (self.features,), jnp.float32)
            x = nn.leaky_relu(add_bias(x, bias), 0.2) * jnp.sqrt(2.0).astype(self.dtype)
        return x

    def _noise(self, x):
        shape = (*x.shape[:-1], 1)
        return jax.random.normal(self.make_rng("noise"), shape) if self.has_rng("noise") else 0.0


class Generator(nn.Module):
    """Maps latents and labels to images.

    Blocks and output layers are named after their height, so that the parameters of a generator of
    small images have the names of the first blocks of a generator of large images.

    Attributes:
      shape: (*space, channels) of an image.
      label_sizes: number of values of each attribute to condition on; empty for none.
      grows: whether the last block is faded in, blended with the output of the one before it.

    Raises:
      ValueError: doubling the base height does not lead to the size of the images.
    """

    config: GeneratorConfig
    shape: tuple[int, ...]
    label_sizes: tuple[int, ...] = ()
    grows: bool = False
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        c, style = self.config, self.config.network == "style"
        heights = heights_of(self.shape, c.base_height, self.grows)
        widths = {h: channels_at(h, heights[-1], c.channels, c.max_channels) for h in heights}
        factor = heights[-1] // heights[0]
        base = (*(n // factor for n in self.shape[:-1]), widths[heights[0]])
        self.embeddings = [Dense((c.latent_dim,)) for _ in self.label_sizes]
        if style:
            self.mapping = [Dense((c.style_dim,), use_bias=True) for _ in range(c.mapping_layers)]
            self.constant = self.param("constant", nn.initializers.normal(1.0), base, jnp.float32)
        else:
            self.first = Dense(base, use_bias=True, dtype=self.dtype)
        for h in heights:
            setattr(self, f"block_{h}", self._block(h, widths[h], heights[0]))
            setattr(self, f"to_image_{h}", self._to_image(h, heights))
        self.heights = heights

    def _block(self, height: int, features: int, first: int):
        kind = self.config.network
        if kind == "style":
            return StyleBlock(features, height == first, self.config.noise, self.dtype)
        if height == first:
            return None
        return (DcganBlock if kind == "dcgan" else ResidualBlock)(features, self.dtype)

    def _to_image(self, height: int, heights: list[int]):
        if self.config.network == "style":
            return ModulatedConv(self.shape[-1], 1, False, self.dtype)
        if height in (heights[-2:] if self.grows else heights[-1:]):
            return Conv(self.shape[-1], (3,) * (len(self.shape) - 1), dtype=self.dtype)
        return None

    def styles(self, z: jax.Array, labels: jax.Array | None) -> jax.Array:
        """[batch, latent_dim] -> styles; unless the network is "style", latents and embeddings."""
        embeddings = [
            layer(jax.nn.one_hot(labels[:, i], size))
            for i, (size, layer) in enumerate(zip(self.label_sizes, self.embeddings, strict=True))
        ]
        if self.config.network != "style":
            return jnp.concatenate([z, *embeddings], -1)
        x = jnp.concatenate([_unit_mean_square(part) for part in (z, *embeddings)], -1)
        for layer in self.mapping:
            x = nn.leaky_relu(layer(x), 0.2) * 2**0.5
        return x

    def synthesize(self, styles: jax.Array, fade: jax.Array | float = 1.0) -> jax.Array:
        """Styles -> images [batch, *space, channels], float32, roughly in [-1, 1].

        Noise inputs come from an rng named "noise"; without it they are 0.

        Args:
          styles: the output of `styles`.
          fade: weight of the last block, if the generator grows; 0 leaves it out.
        """
        style = self.config.network == "style"
        if style:
            x = jnp.broadcast_to(self.constant, (styles.shape[0], *self.constant.shape))
            x = x.astype(self.dtype)
        else:
            x = self.first(styles)
        image = None
        for height in self.heights:
            last = height == self.heights[-1]
            block = getattr(self, f"block_{height}")
            layer = getattr(self, f"to_image_{height}")
            x = x if block is None else block(x, styles)
            if layer is None:
                continue
            output = layer(x, styles) if style else layer(nn.relu(x))
            weight = fade if last and self.grows else 1.0
            previous = 0.0 if image is None else upsample(image, (2,) * (x.ndim - 2))
            # "style" sums the outputs of all blocks; the others use the last, or fade over to it.
            previous = previous if style else (1 - weight) * previous
            image = previous + weight * output
        image = image.astype(jnp.float32)
        return image if style else jnp.tanh(image)

    def __call__(self, z: jax.Array, labels: jax.Array | None = None) -> jax.Array:
        """`styles` followed by `synthesize`; used by `init`."""
        return self.synthesize(self.styles(z, labels))


def _over_space(x: jax.Array, like: jax.Array) -> jax.Array:
    """[batch, channels] -> [batch, 1, ..., channels]."""
    return x.reshape(x.shape[0], *(1,) * (like.ndim - 2), x.shape[-1])


def _unit_mean_square(x: jax.Array) -> jax.Array:
    """Each vector of [..., dim] scaled to mean square 1."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-8)


# Parameter path -> logical axes; the first pattern that matches applies.
PARTITION_RULES = (
    (r"(embeddings|mapping)_\d+/kernel", (None, "mlp")),
    (r"mapping_\d+/bias", ("mlp",)),
    (r"first/kernel", (..., "features")),
    (r"style(_\w+)?/kernel", ("embed", None)),
    (r"to_image_\d+/kernel", (..., None, None)),
    (r"block_\d+/.*kernel", (..., None, "features")),
    (r"constant|first/bias", (...,)),
    (r"(bias|scale|style_bias|bias_\d)$", (None,)),
    (r"noise_\d$", ()),
)
