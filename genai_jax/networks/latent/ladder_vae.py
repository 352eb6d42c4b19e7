"""A hierarchical variational autoencoder: latents at every size, from the top down (Child 2021).

An encoder goes up once; a decoder comes down and at each block compares what it expects (the prior)
with what it expects having seen the encoder's features of that size (the posterior).
"""

import dataclasses
import itertools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp

from genai_jax.config import field
from genai_jax.networks.latent.latent_variables import Latents, draw_latents
from genai_jax.networks.layers.convolution import Conv, downsample, upsample
from genai_jax.networks.layers.dense import Dense


@dataclasses.dataclass(frozen=True)
class LadderVaeConfig:
    stages: str = field("1x1,4x2,8x2", "height x blocks, from the top down to the image's height")
    channels: int = field(32, "of the residual streams", minimum=1)
    bottleneck: int = field(4, "times fewer channels inside a block", minimum=1)
    latent_channels: int = field(8, "latent variables at each point of a block", minimum=1)
    scan_blocks: bool = field(False, "one compiled block a stage looped over: not for CPUs")
    remat: bool = field(False, "recompute the blocks in the backward pass, to save memory")

    def __post_init__(self):
        text = f"--ladder_vae.stages={self.stages}"
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(,[1-9]\d*x[1-9]\d*)*", self.stages):
            raise ValueError(f"{text} is not like 1x1,4x2,8x2: height x blocks, comma-separated")
        heights = [height for height, _ in self.sizes]
        grows = all(b > a and b % a == 0 for a, b in itertools.pairwise(heights))
        if not grows:
            raise ValueError(f"{text}: each height is to be a multiple of the one before")
        if self.channels % self.bottleneck:
            raise ValueError(
                f"--ladder_vae.bottleneck={self.bottleneck} does not divide "
                f"--ladder_vae.channels={self.channels}"
            )

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, blocks) of each stage, from the top down."""
        pairs = (stage.split("x") for stage in self.stages.split(","))
        return [(int(height), int(blocks)) for height, blocks in pairs]

    def check_shape(self, shape: tuple[int, ...]):
        """Raises `ValueError` if the stages do not fit images (*space, channels)."""
        *space, _ = shape
        heights = [height for height, _ in self.sizes]
        if heights[-1] != space[0] or any(n % (space[0] // heights[0]) for n in space):
            size = "x".join(map(str, space))
            raise ValueError(
                f"--ladder_vae.stages={self.stages} does not fit images of {size}: the last height"
                " is theirs, and what divides it divides the other sizes"
            )


class Bottleneck(nn.Module):
    """1x1, two 3x3 and 1x1 convolutions after an activation each; 1x1 all of them at tiny sizes."""

    hidden: int
    features: int
    init_scale: float = 1.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        space = x.ndim - 2
        point, wide = (1,) * space, (3 if min(x.shape[1:-1]) > 2 else 1,) * space
        plan = (
            (self.hidden, point), (self.hidden, wide), (self.hidden, wide), (self.features, point),
        )  # fmt: skip
        for i, (features, kernel) in enumerate(plan):
            scale = self.init_scale if i == len(plan) - 1 else 1.0
            x = nn.gelu(x) if i else nn.gelu(x.astype(self.dtype))
            x = Conv(features, kernel, init_scale=scale, dtype=self.dtype, name=f"conv_{i}")(x)
        return x


class UpBlock(nn.Module):
    """A residual block of the encoder."""

    config: LadderVaeConfig
    init_scale: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        c = self.config
        hidden = c.channels // c.bottleneck
        x = x + Bottleneck(hidden, c.channels, self.init_scale, self.dtype, name="block")(x)
        return _constrained(x), None


class DownBlock(nn.Module):
    """Prior, posterior, and what a draw of them adds to the decoder's stream."""

    config: LadderVaeConfig
    init_scale: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, given, features, temperature) -> tuple[jax.Array, Latents]:
        c = self.config
        n, hidden, point = c.latent_channels, c.channels // c.bottleneck, (1,) * (x.ndim - 2)
        # Zero at the start: the first prior is the standard normal.
        told = Bottleneck(hidden, 2 * n + c.channels, 0.0, self.dtype, name="prior")(x)
        prior = _parameters(told[..., : 2 * n])
        posterior = None
        if features is not None:
            seen = jnp.concatenate([x, features], -1)
            posterior = _parameters(
                Bottleneck(hidden, 2 * n, 1.0, self.dtype, name="posterior")(seen)
            )
        rng = self.make_rng("latents") if self.has_rng("latents") else None
        latents = draw_latents(posterior, prior, given, rng, temperature)
        x = x + told[..., 2 * n :]
        x = x + Conv(
            c.channels, point, init_scale=self.init_scale, dtype=self.dtype, name="latents"
        )(latents.z)
        x = x + Bottleneck(hidden, c.channels, self.init_scale, self.dtype, name="block")(x)
        return _constrained(x), latents


def _parameters(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    mean, log_scale = jnp.split(x.astype(jnp.float32), 2, -1)
    return mean, jnp.clip(log_scale, -15, 10)


def _constrained(x: jax.Array) -> jax.Array:
    return nn.with_logical_constraint(x, ("batch", *(None,) * (x.ndim - 2), "activation_embed"))


class LadderVae(nn.Module):
    """The interface of `dense_vae.DenseVae`; latents of a stage [batch, blocks, *size, channels].

    Attributes:
      shape: (*space, channels) of an image.
      outputs_per_value: numbers that the decoder gives for each value of it.
      label_sizes: number of values of each attribute that the model is told; empty: none.
      dtype: of the convolutions.

    Raises:
      ValueError: stages that do not fit the shape.
    """

    config: LadderVaeConfig
    shape: tuple[int, ...]
    outputs_per_value: int = 1
    label_sizes: tuple[int, ...] = ()
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        c = self.config
        c.check_shape(self.shape)
        self.conv_in = Conv(c.channels, (3,) * self._space, dtype=self.dtype)
        scale = 1 / sum(blocks for _, blocks in c.sizes)  # variance of all branches together is 1
        self.up = [self._stage(UpBlock, blocks, scale) for _, blocks in c.sizes]
        told = (0, nn.broadcast, nn.broadcast)
        self.down = [self._stage(DownBlock, blocks, scale, told) for _, blocks in c.sizes]
        self.start = [
            self.param(f"start_{i}", nn.initializers.zeros, (c.channels,), jnp.float32)
            for i in range(len(c.sizes))
        ]
        self.labels = [Dense((c.channels,), dtype=self.dtype) for _ in self.label_sizes]
        self.conv_out = Conv(self.shape[-1] * self.outputs_per_value, (1,) * self._space)

    @property
    def _space(self) -> int:
        return len(self.shape) - 1

    def _stage(self, block, length: int, scale: float, in_axes: tuple = ()):
        if self.config.remat:
            block = nn.remat(block, prevent_cse=False)
        return nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "latents": True},
            in_axes=in_axes,
            length=length,
            unroll=1 if self.config.scan_blocks else length + 1,
        )(self.config, scale, dtype=self.dtype)

    def _size(self, stage: int) -> tuple[int, ...]:
        """Size in space at a stage."""
        factor = self.shape[0] // self.config.sizes[stage][0]
        return tuple(n // factor for n in self.shape[:-1])

    def bottom_up(self, x: jax.Array, labels: jax.Array | None) -> list[jax.Array]:
        """Images in [-1, 1] -> features of each stage, from the top down."""
        x = self.conv_in(x) + self._told(labels)
        features = []
        for stage in reversed(range(len(self.up))):
            size = self._size(stage)
            x = downsample(x, [n // m for n, m in zip(x.shape[1:-1], size, strict=True)])
            x, _ = self.up[stage](x)
            features.insert(0, x)
        return features

    def top_down(
        self, features, labels, *, batch: int, given=None, temperature: float = 1.0
    ) -> tuple[jax.Array, list[Latents]]:
        """As `DenseVae.top_down`."""
        c, told, found = self.config, self._told(labels), []
        x = jnp.zeros((batch, *self._size(0), c.channels), self.dtype)
        for stage, blocks in enumerate(self.down):
            size = self._size(stage)
            x = upsample(x, [n // m for n, m in zip(size, x.shape[1:-1], strict=True)])
            x = x + self.start[stage].astype(self.dtype) + told
            z = None if given is None else jnp.moveaxis(given[stage], 1, 0)
            seen = None if features is None else features[stage]
            x, latents = blocks(x, z, seen, temperature)
            found.append(jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), latents))
        outputs = self.conv_out(nn.gelu(x)).astype(jnp.float32)
        return outputs.reshape(batch, *self.shape, self.outputs_per_value), found

    def _told(self, labels):
        """What the labels add to a stream, [batch, 1, ..., channels], or 0."""
        told = jnp.zeros((), self.dtype)
        for i, (size, layer) in enumerate(zip(self.label_sizes, self.labels, strict=True)):
            told = told + layer(jax.nn.one_hot(labels[:, i], size))
        return told.reshape(-1, *(1,) * self._space, told.shape[-1]) if self.label_sizes else told

    def __call__(self, x: jax.Array, labels: jax.Array | None = None) -> jax.Array:
        """There and back without noise; call `init` with it."""
        features = self.bottom_up(x, labels)
        return self.top_down(features, labels, batch=x.shape[0])[0]


# Parameter path -> logical axes. The first pattern found in the path decides; kernels have as many
# axes in front as there are of space, and of blocks.
PARTITION_RULES = (
    (r"(up|down)_\d+/.*kernel", (..., None, "features")),
    (r"(up|down)_\d+/.*bias", ("blocks", None)),
    (r"conv_in/kernel", (..., None, "features")),
    (r"conv_out/kernel", (..., None, None)),
    (r"labels_\d+/kernel", (None, "embed")),
    (r"(conv_(in|out)/bias|start_\d+)", (None,)),
)
