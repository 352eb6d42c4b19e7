"""Glow (Kingma and Dhariwal 2018): an invertible network on images, with its log-determinant.

Each level is a sequence of steps of three invertible layers: a scale and bias per channel, a mixing
of the channels, and a coupling, in which half of the channels determines the scale and shift of the
other half. After each level but the last, half of the channels becomes latents. Everything is in
float32, since the inverse needs that precision.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from genai_jax.config import field
from genai_jax.networks.layers.convolution import Conv
from genai_jax.networks.layers.dense import Dense

LOG_2PI = math.log(2 * math.pi)


@dataclasses.dataclass(frozen=True)
class GlowConfig:
    levels: int = field(2, "Levels, each of which halves the size.", minimum=1)
    steps_per_level: int = field(4, "Steps of scaling, mixing and coupling per level.", minimum=1)
    hidden_channels: int = field(64, "Hidden channels of a coupling.", minimum=1)

    def check_shape(self, shape: tuple[int, ...]):
        """Raises ValueError if every level cannot halve images (height, width, channels)."""
        if len(shape) != 3 or any(n % 2**self.levels for n in shape[:2]):
            size = "x".join(map(str, shape[:-1]))
            raise ValueError(
                f"levels={self.levels} needs images whose height and width are multiples of "
                f"{2**self.levels}, not {size}"
            )


def squeeze(x: jax.Array) -> jax.Array:
    """[batch, height, width, channels] -> [batch, height / 2, width / 2, 4 channels]."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // 2, width // 2, 4 * channels)


def unsqueeze(x: jax.Array) -> jax.Array:
    """The inverse of `squeeze`."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, 2, 2, channels // 4)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, 2 * height, 2 * width, channels // 4)


class Actnorm(nn.Module):
    """A scale and a bias per channel; `init` sets them to standardize the batch it is given."""

    @nn.compact
    def __call__(self, x: jax.Array, reverse: bool = False) -> tuple[jax.Array, jax.Array]:
        """Returns the result and log |det| of the Jacobian of the forward direction, a scalar."""
        axes = tuple(range(x.ndim - 1))
        bias = self.param("bias", lambda _: -jnp.mean(x, axes))
        log_scale = self.param("log_scale", lambda _: -jnp.log(jnp.std(x, axes) + 1e-3))
        log_det = x.shape[1] * x.shape[2] * jnp.sum(log_scale)
        if reverse:
            return x * jnp.exp(-log_scale) - bias, log_det
        return (x + bias) * jnp.exp(log_scale), log_det


class Mixing(nn.Module):
    """An invertible 1x1 convolution, initialized to a random rotation."""

    @nn.compact
    def __call__(self, x: jax.Array, reverse: bool = False) -> tuple[jax.Array, jax.Array]:
        """Returns what `Actnorm` does."""
        channels = x.shape[-1]
        kernel = self.param("kernel", nn.initializers.orthogonal(), (channels, channels))
        log_det = x.shape[1] * x.shape[2] * jnp.linalg.slogdet(kernel)[1]
        if reverse:
            flat = x.reshape(-1, channels)
            return jnp.linalg.solve(kernel.T, flat.T).T.reshape(x.shape), log_det
        return jnp.matmul(x, kernel, precision="highest"), log_det


class Coupling(nn.Module):
    """Half of the channels determines scale and shift of the rest; initially the identity."""

    hidden_channels: int

    @nn.compact
    def __call__(self, x, condition=None, reverse: bool = False) -> tuple[jax.Array, jax.Array]:
        """Returns what `Actnorm` does, but a log-determinant per example, [batch].

        Args:
          x: [batch, height, width, channels].
          condition: [batch, features], such as one-hot labels, or None.
          reverse: whether to apply the inverse.
        """
        kept = x.shape[-1] // 2
        a, b = x[..., :kept], x[..., kept:]
        h = Conv(self.hidden_channels, (3, 3), name="conv_in")(a)
        if condition is not None:
            update = Dense((self.hidden_channels,), name="told")(condition)
            h = h + update[:, None, None, :]
        h = nn.relu(Conv(self.hidden_channels, (1, 1), name="conv_mid")(nn.relu(h)))
        h = Conv(2 * b.shape[-1], (3, 3), init_scale=0, name="conv_out")(h)
        shift, log_scale = jnp.split(h, 2, -1)
        log_scale = 2 * jnp.tanh(log_scale / 2)  # bounded, so that scales cannot explode
        b = b * jnp.exp(-log_scale) - shift if reverse else (b + shift) * jnp.exp(log_scale)
        return jnp.concatenate([a, b], -1), jnp.sum(log_scale, (1, 2, 3))


class Glow(nn.Module):
    """Images [batch, height, width, channels] <-> Gaussian latents, one array per level.

    Attributes:
      label_sizes: number of values of each attribute to condition couplings on; empty for none.
    """

    config: GlowConfig
    label_sizes: tuple[int, ...] = ()

    def setup(self):
        c = self.config
        count = c.levels * c.steps_per_level
        self.actnorm = [Actnorm() for _ in range(count)]
        self.mixing = [Mixing() for _ in range(count)]
        self.coupling = [Coupling(c.hidden_channels) for _ in range(count)]
        self.prior = [PriorOfHalf() for _ in range(c.levels - 1)]

    def forward(
        self, x: jax.Array, labels: jax.Array | None = None
    ) -> tuple[list[jax.Array], jax.Array, jax.Array]:
        """Images -> latents, log |det| of the Jacobian [batch], log-density of the latents [batch].

        The log-density of x is the sum of the last two. Latents are standardized by their prior, so
        that all are standard normal; the last level's prior is the standard normal itself.
        """
        condition, latents = self._one_hot(labels), []
        log_det = log_prior = jnp.zeros(x.shape[0])
        for level in range(self.config.levels):
            x = squeeze(x)
            for step in self._steps(level):
                x, log_det_actnorm = self.actnorm[step](x)
                x, log_det_mixing = self.mixing[step](x)
                x, log_det_coupling = self.coupling[step](x, condition)
                log_det += log_det_actnorm + log_det_mixing + log_det_coupling
            if level < self.config.levels - 1:
                x, half = jnp.split(x, 2, -1)
                mean, log_scale = self.prior[level](x)
                z = (half - mean) * jnp.exp(-log_scale)
                log_prior -= jnp.sum(log_scale, (1, 2, 3))
            else:
                z = x
            latents.append(z)
            log_prior += jnp.sum(-(jnp.square(z) + LOG_2PI) / 2, (1, 2, 3))
        return latents, log_det, log_prior

    def inverse(self, latents: list[jax.Array], labels: jax.Array | None = None) -> jax.Array:
        """Latents, standardized by their prior -> images."""
        condition, x = self._one_hot(labels), None
        for level in reversed(range(self.config.levels)):
            z = latents[level]
            if x is None:
                x = z
            else:
                mean, log_scale = self.prior[level](x)
                x = jnp.concatenate([x, mean + jnp.exp(log_scale) * z], -1)
            for step in reversed(self._steps(level)):
                x, _ = self.coupling[step](x, condition, reverse=True)
                x, _ = self.mixing[step](x, reverse=True)
                x, _ = self.actnorm[step](x, reverse=True)
            x = unsqueeze(x)
        return x

    def latent_shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """(height, width, channels) of an image -> shape of the latents of each level."""
        height, width, channels = shape
        shapes = []
        for level in range(self.config.levels):
            height, width, channels = height // 2, width // 2, 4 * channels
            if level < self.config.levels - 1:
                channels //= 2
            shapes.append((height, width, channels))
        return shapes

    def _steps(self, level: int) -> range:
        count = self.config.steps_per_level
        return range(level * count, (level + 1) * count)

    def _one_hot(self, labels):
        """The labels as concatenated one-hot vectors, [batch, sum of sizes]; None without any."""
        if not self.label_sizes:
            return None
        vectors = [jax.nn.one_hot(labels[:, i], size) for i, size in enumerate(self.label_sizes)]
        return jnp.concatenate(vectors, -1)

    def __call__(self, x: jax.Array, labels: jax.Array | None = None) -> jax.Array:
        """Log-density, nats [batch]; used by `init`, which must be given a batch of data."""
        _, log_det, log_prior = self.forward(x, labels)
        return log_det + log_prior


class PriorOfHalf(nn.Module):
    """Mean and log-scale of half of the channels given the other half; initially 0."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = Conv(2 * x.shape[-1], (3, 3), init_scale=0, name="conv")(x)
        mean, log_scale = jnp.split(h, 2, -1)
        return mean, 2 * jnp.tanh(log_scale / 2)


# Parameter path -> logical axes; the first pattern that matches applies.
PARTITION_RULES = (
    (r"coupling_\d+/conv_(in|mid)/kernel", (..., None, "features")),
    (r"coupling_\d+/conv_out/kernel", (..., None, None)),
    (r"coupling_\d+/told/kernel", (None, "mlp")),
    (r"prior_\d+/conv/kernel", (..., None, None)),
    (r"mixing_\d+/kernel", (None, None)),
    (r"(bias|log_scale)$", (None,)),
)
