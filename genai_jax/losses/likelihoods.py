"""Likelihoods of images given the outputs of a decoder.

A decoder outputs `outputs_per_value` numbers for each value of an image: [batch, *space, channels,
outputs_per_value]. All log-likelihoods are those of the discrete image, in nats, so that they are
comparable.
"""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

OPEN_EDGE = 1e-4  # values this close to -1 or 1 are at the ends of the range


class Likelihood:
    """Base class of the likelihoods.

    Attributes:
      levels: values of an image are 0 .. levels - 1.
      channels: channels of an image.
      outputs_per_value: numbers that a decoder outputs for each value of an image.
    """

    per_value: ClassVar[int] = 1

    def __init__(self, levels: int, channels: int):
        self.levels, self.channels = levels, channels
        self.outputs_per_value = self.per_value

    def init(self) -> dict:
        """Learned parameters besides the decoder's outputs."""
        return {}

    def scaled(self, image: jax.Array) -> jax.Array:
        """Levels 0 .. levels - 1 -> [-1, 1], float32."""
        return image.astype(jnp.float32) * (2 / (self.levels - 1)) - 1

    def observe(self, image: jax.Array, rng: jax.Array) -> tuple[jax.Array, jax.Array]:
        """uint8 levels -> the encoder's input, in [-1, 1], and the target of `log_prob`."""
        del rng
        return self.scaled(image), image

    def log_prob(self, params: dict, outputs: jax.Array, target: jax.Array) -> jax.Array:
        """Log-likelihood of each example, [batch], nats."""
        raise NotImplementedError

    def mean(self, outputs: jax.Array) -> jax.Array:
        """The expected image in [-1, 1], [batch, *space, channels]."""
        raise NotImplementedError

    def sample(self, params: dict, outputs: jax.Array, rng: jax.Array) -> jax.Array:
        """Samples every value of an image independently, in [-1, 1]."""
        raise NotImplementedError


class Bernoulli(Likelihood):
    """Binary values; gray levels are binarized at random, white with probability level / maximum.

    Training binarizes an image again whenever it is used (Burda et al. 2016, section 5). The
    likelihood is that of the binarized images.
    """

    def observe(self, image, rng):
        white = jax.random.bernoulli(rng, image.astype(jnp.float32) / (self.levels - 1))
        white = white.astype(jnp.float32)
        return 2 * white - 1, white

    def log_prob(self, params, outputs, target):
        logits = outputs[..., 0]
        return _total(target * logits - jax.nn.softplus(logits))

    def mean(self, outputs):
        return 2 * jax.nn.sigmoid(outputs[..., 0]) - 1

    def sample(self, params, outputs, rng):
        return 2.0 * jax.random.bernoulli(rng, jax.nn.sigmoid(outputs[..., 0])) - 1


class Gaussian(Likelihood):
    """A Gaussian with a predicted mean for each value and a learned scale for each channel.

    The image is dequantized with uniform noise, so that the expected log-density is a lower bound
    on the log-likelihood of the discrete image (Theis et al. 2016, equation 3).
    """

    def init(self):
        return {"log_scale": jnp.full((self.channels,), -1.0)}

    def observe(self, image, rng):
        x = (image.astype(jnp.float32) + jax.random.uniform(rng, image.shape)) / self.levels
        return 2 * x - 1, 2 * x - 1

    def log_prob(self, params, outputs, target):
        nats = gaussian_log_density(target, outputs[..., 0], params["log_scale"])
        return nats + math.prod(target.shape[1:]) * math.log(2 / self.levels)

    def mean(self, outputs):
        return self._center(outputs[..., 0])

    def sample(self, params, outputs, rng):
        mean = outputs[..., 0]
        noise = jnp.exp(params["log_scale"]) * jax.random.normal(rng, mean.shape)
        return self._center(mean + noise)

    def _center(self, x):
        """Maps a dequantized value so that the center of bin i becomes `scaled(i)`."""
        return self.scaled((x + 1) / 2 * self.levels - 0.5)


class DiscretizedLogistic(Likelihood):
    """The mass of a logistic distribution in a level's bin (Kingma et al. 2016, equation 26)."""

    per_value = 2  # mean, log-scale

    def log_prob(self, params, outputs, target):
        mean, scale = self._split(outputs)
        x, half = self.scaled(target), 1 / (self.levels - 1)
        above, below = (x - mean + half) / scale, (x - mean - half) / scale
        # log(sigmoid(a) - sigmoid(b)) = log_sigmoid(a) + log_sigmoid(-b) + log(1 - exp(b - a)):
        # accurate even where both sigmoids round to 0 or 1.
        inside = jax.nn.log_sigmoid(above) + jax.nn.log_sigmoid(-below)
        inside += jnp.log(-jnp.expm1(below - above))
        lowest, highest = x < -1 + OPEN_EDGE, x > 1 - OPEN_EDGE
        edges = jnp.where(lowest, jax.nn.log_sigmoid(above), jax.nn.log_sigmoid(-below))
        return _total(jnp.where(lowest | highest, edges, inside))

    def _split(self, outputs):
        return outputs[..., 0], jnp.exp(jnp.clip(outputs[..., 1] - 2, -7, 3))

    def mean(self, outputs):
        return outputs[..., 0]

    def sample(self, params, outputs, rng):
        mean, scale = self._split(outputs)
        return mean + scale * jax.random.logistic(rng, mean.shape)


class Categorical(Likelihood):
    """A categorical distribution over the levels, for each value."""

    def __init__(self, levels: int, channels: int):
        super().__init__(levels, channels)
        self.outputs_per_value = levels

    def log_prob(self, params, outputs, target):
        logits = jnp.take_along_axis(outputs, target.astype(jnp.int32)[..., None], -1)[..., 0]
        return _total(logits - jax.nn.logsumexp(outputs, -1))

    def mean(self, outputs):
        return jax.nn.softmax(outputs) @ self.scaled(jnp.arange(self.levels))

    def sample(self, params, outputs, rng):
        return self.scaled(jax.random.categorical(rng, outputs))


LIKELIHOODS = {
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
    "discretized_logistic": DiscretizedLogistic,
    "categorical": Categorical,
}


def gaussian_log_density(x: jax.Array, mean: Any, log_scale: Any) -> jax.Array:
    """Log-density of each example under a Gaussian, nats: [batch, ...] -> [batch]."""
    error = (x - mean) * jnp.exp(-log_scale)
    return _total(-jnp.square(error) / 2 - log_scale - math.log(2 * math.pi) / 2)


def _total(nats: jax.Array) -> jax.Array:
    """Sum over each example: [batch, ...] -> [batch]."""
    return jnp.sum(nats, range(1, nats.ndim))
