"""A hierarchical variational autoencoder with latents at every resolution (Child 2021).

The encoder computes features bottom-up. The decoder runs top-down; each of its blocks has a prior,
which depends on the latents above it, and a posterior, which also depends on the encoder's features
at its resolution.
"""

import dataclasses
import itertools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp

from genai_jax.config import field
from genai_jax.networks.latent.latent_variables import Latents, sample_latents
from genai_jax.networks.layers.convolution import Conv, downsample, upsample
from genai_jax.networks.layers.dense import Dense, add_bias


@dataclasses.dataclass(frozen=True)
class LadderVaeConfig:
    stages: str = field(
        "1x1,4x2,8x2",
        "Height x blocks of each stage, comma-separated, from the top down to the image's height.",
    )
    channels: int = field(32, "Channels of the residual streams.", minimum=1)
    bottleneck: int = field(4, "Factor by which channels are reduced inside a block.", minimum=1)
    latent_channels: int = field(8, "Latent variables per position of a block.", minimum=1)
    scan_blocks: bool = field(
        False, "Compile one block per stage and run it in a loop; slow on CPUs."
    )
    remat: bool = field(False, "Recompute the blocks in the backward pass to save memory.")

    def __post_init__(self):
        setting = f"stages={self.stages}"
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(,[1-9]\d*x[1-9]\d*)*", self.stages):
            raise ValueError(f"{setting} is not like 1x1,4x2,8x2: height x blocks, comma-separated")
        heights = [height for height, _ in self.sizes]
        grows = all(b > a and b % a == 0 for a, b in itertools.pairwise(heights))
        if not grows:
            raise ValueError(f"{setting}: each height must be a larger multiple of the one before")
        if self.channels % self.bottleneck:
            raise ValueError(
                f"bottleneck={self.bottleneck} does not divide channels={self.channels}"
            )

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, blocks) of each stage, from the top down."""
        pairs = (stage.split("x") for stage in self.stages.split(","))
        return [(int(height), int(blocks)) for height, blocks in pairs]

    def check_shape(self, shape: tuple[int, ...]):
        """Raises ValueError if the stages do not fit images of shape (*space, channels)."""
        *space, _ = shape
        heights = [height for height, _ in self.sizes]
        if heights[-1] != space[0] or any(n % (space[0] // heights[0]) for n in space):
            size = "x".join(map(str, space))
            raise ValueError(
                f"stages={self.stages} does not fit images of {size}: the last height must be that "
                "of the images, and the factor down to the first must divide all of their sizes"
            )


class Bottleneck(nn.Module):
    """1x1, 3x3, 3x3 and 1x1 convolutions, each after an activation; at tiny sizes all are 1x1."""

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
    """Computes prior and posterior, samples latents, and adds them to the decoder's stream."""

    config: LadderVaeConfig
    init_scale: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, given, features, temperature) -> tuple[jax.Array, Latents]:
        c = self.config
        n, hidden, point = c.latent_channels, c.channels // c.bottleneck, (1,) * (x.ndim - 2)
        # Initialized to zero, so that the first prior is the standard normal.
        outputs = Bottleneck(hidden, 2 * n + c.channels, 0.0, self.dtype, name="prior")(x)
        prior = _parameters(outputs[..., : 2 * n])
        posterior = None
        if features is not None:
            both = jnp.concatenate([x, features], -1)
            posterior = _parameters(
                Bottleneck(hidden, 2 * n, 1.0, self.dtype, name="posterior")(both)
            )
        rng = self.make_rng("latents") if self.has_rng("latents") else None
        latents = sample_latents(posterior, prior, given, rng, temperature)
        x = x + outputs[..., 2 * n :]
        x = x + Conv(
            c.channels, point, init_scale=self.init_scale, dtype=self.dtype, name="latents"
        )(latents.z)
        x = x + Bottleneck(hidden, c.channels, self.init_scale, self.dtype, name="block")(x)
        return _constrained(x), latents


def _parameters(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and log-scale, float32."""
    mean, log_scale = jnp.split(x.astype(jnp.float32), 2, -1)
    return mean, jnp.clip(log_scale, -15, 10)


def _constrained(x: jax.Array) -> jax.Array:
    return nn.with_logical_constraint(x, ("batch", *(None,) * (x.ndim - 2), "activation_embed"))


class LadderVae(nn.Module):
    """Has the interface of `DenseVae`; the latents of a stage are [batch, blocks, *size, channels].

    Attributes:
      shape: (*space, channels) of an image.
      outputs_per_value: numbers that the decoder outputs for each value of an image.
      label_sizes: number of values of each attribute to condition on; empty for none.
      dtype: dtype of the convolutions.

    Raises:
      ValueError: the stages do not fit the shape.
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
        in_axes = (0, nn.broadcast, nn.broadcast)  # given, features, temperature
        self.down = [self._stage(DownBlock, blocks, scale, in_axes) for _, blocks in c.sizes]
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
        """Spatial size at a stage."""
        factor = self.shape[0] // self.config.sizes[stage][0]
        return tuple(n // factor for n in self.shape[:-1])

    def bottom_up(self, x: jax.Array, labels: jax.Array | None) -> list[jax.Array]:
        """Images in [-1, 1] -> features of each stage, from the top down."""
        x = add_bias(self.conv_in(x), self._label_embedding(labels))
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
        """See `DenseVae.top_down`."""
        c, embedding, stages = self.config, self._label_embedding(labels), []
        x = jnp.zeros((batch, *self._size(0), c.channels), self.dtype)
        for stage, blocks in enumerate(self.down):
            size = self._size(stage)
            x = upsample(x, [n // m for n, m in zip(size, x.shape[1:-1], strict=True)])
            x = add_bias(x, self.start[stage] + embedding)
            z = None if given is None else jnp.moveaxis(given[stage], 1, 0)
            stage_features = None if features is None else features[stage]
            x, latents = blocks(x, z, stage_features, temperature)
            stages.append(jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), latents))
        outputs = self.conv_out(nn.gelu(x)).astype(jnp.float32)
        return outputs.reshape(batch, *self.shape, self.outputs_per_value), stages

    def _label_embedding(self, labels):
        """The sum of the labels' embeddings, [batch, 1, ..., channels], in float32.

        0 without labels.
        """
        total = jnp.float32(0)
        if not self.label_sizes:
            return total
        for i, (size, layer) in enumerate(zip(self.label_sizes, self.labels, strict=True)):
            total = total + layer(jax.nn.one_hot(labels[:, i], size))
        return total.reshape(-1, *(1,) * self._space, total.shape[-1])

    def __call__(self, x: jax.Array, labels: jax.Array | None = None) -> jax.Array:
        """Encodes and decodes without noise; used by `init`."""
        features = self.bottom_up(x, labels)
        return self.top_down(features, labels, batch=x.shape[0])[0]


# Parameter path -> logical axes; the first pattern that matches applies. Kernels have leading axes
# for space and for blocks.
PARTITION_RULES = (
    (r"(up|down)_\d+/.*kernel", (..., None, "features")),
    (r"(up|down)_\d+/.*bias", ("blocks", None)),
    (r"conv_in/kernel", (..., None, "features")),
    (r"conv_out/kernel", (..., None, None)),
    (r"labels_\d+/kernel", (None, "embed")),
    (r"(conv_(in|out)/bias|start_\d+)", (None,)),
)
