"""How likely an image is, given what a decoder says of every value of it.

A decoder says `per_value` numbers for each value: [batch, *space, channels, per_value]. All
log-likelihoods are of the discrete image, in nats, so that they can be compared.
"""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

OPEN_EDGE = 1e-4  # how near to -1 and 1 a value is an end of the range


class Likelihood:
    """What the four have in common.

    Attributes:
      levels: values of an image are 0 .. levels - 1.
      channels: of an image.
      per_value: numbers that a decoder gives for each value of an image.
    """

    per_value: ClassVar[int] = 1

    def __init__(self, levels: int, channels: int):
        self.levels, self.channels = levels, channels
        self.outputs_per_value = self.per_value

    def init(self) -> dict:
        """Parameters of its own, beside what the decoder says."""
        return {}

    def scaled(self, image: jax.Array) -> jax.Array:
        return image.astype(jnp.float32) * (2 / (self.levels - 1)) - 1

    def observe(self, image: jax.Array, rng: jax.Array) -> tuple[jax.Array, jax.Array]:
        """uint8 levels -> what the encoder sees, in [-1, 1], and what `log_prob` is taken of."""
        del rng
        return self.scaled(image), image

    def log_prob(self, params: dict, outputs: jax.Array, target: jax.Array) -> jax.Array:
        """Log-likelihood of each example, [batch], nats."""
        raise NotImplementedError

    def mean(self, outputs: jax.Array) -> jax.Array:
        """The expected image in [-1, 1], [batch, *space, channels]."""
        raise NotImplementedError

    def draw(self, params: dict, outputs: jax.Array, rng: jax.Array) -> jax.Array:
        """An image drawn value by value, in [-1, 1]."""
        raise NotImplementedError


class Bernoulli(Likelihood):
    """Black or white. Grey is binarized: white with the probability that its level stands for.

    Drawn anew at every look in training (Burda et al. 2016, section 5). The likelihood is then that
    of binarized images.
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

    def draw(self, params, outputs, rng):
        return 2.0 * jax.random.bernoulli(rng, jax.nn.sigmoid(outputs[..., 0])) - 1


class Gaussian(Likelihood):
    """A mean for each value and one learned scale for each channel.

    The image is dequantized with uniform noise, so that the density bounds the likelihood of the
    discrete image from below (Theis et al. 2016, equation 3).
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

    def draw(self, params, outputs, rng):
        mean = outputs[..., 0]
        noise = jnp.exp(params["log_scale"]) * jax.random.normal(rng, mean.shape)
        return self._center(mean + noise)

    def _center(self, x):
        """A dequantized value to the scale on which the centre of bin i is `scaled(i)`."""
        return self.scaled((x + 1) / 2 * self.levels - 0.5)


class DiscretizedLogistic(Likelihood):
    """The mass of a logistic density in the bin of a level (Kingma et al. 2016, equation 26)."""

    per_value = 2  # mean, log-scale

    def log_prob(self, params, outputs, target):
        mean, scale = self._split(outputs)
        x, half = self.scaled(target), 1 / (self.levels - 1)
        above, below = (x - mean + half) / scale, (x - mean - half) / scale
        # log(sigmoid(a) - sigmoid(b)) = log_sigmoid(a) + log_sigmoid(-b) + log(1 - exp(b - a)):
        # exact also where both sigmoids are 0 or 1.
        inside = jax.nn.log_sigmoid(above) + jax.nn.log_sigmoid(-below)
        inside += jnp.log(-jnp.expm1(below - above))
        lowest, highest = x < -1 + OPEN_EDGE, x > 1 - OPEN_EDGE
        edges = jnp.where(lowest, jax.nn.log_sigmoid(above), jax.nn.log_sigmoid(-below))
        return _total(jnp.where(lowest | highest, edges, inside))

    def _split(self, outputs):
        return outputs[..., 0], jnp.exp(jnp.clip(outputs[..., 1] - 2, -7, 3))

    def mean(self, outputs):
        return outputs[..., 0]

    def draw(self, params, outputs, rng):
        mean, scale = self._split(outputs)
        return mean + scale * jax.random.logistic(rng, mean.shape)


class Categorical(Likelihood):
    """A probability for every level."""

    def __init__(self, levels: int, channels: int):
        super().__init__(levels, channels)
        self.outputs_per_value = levels

    def log_prob(self, params, outputs, target):
        chosen = jnp.take_along_axis(outputs, target.astype(jnp.int32)[..., None], -1)[..., 0]
        return _total(chosen - jax.nn.logsumexp(outputs, -1))

    def mean(self, outputs):
        return jax.nn.softmax(outputs) @ self.scaled(jnp.arange(self.levels))

    def draw(self, params, outputs, rng):
        return self.scaled(jax.random.categorical(rng, outputs))


LIKELIHOODS = {
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
    "discretized_logistic": DiscretizedLogistic,
    "categorical": Categorical,
}


def gaussian_log_density(x: jax.Array, mean: Any, log_scale: Any) -> jax.Array:
    """Of each example, nats: [batch, ...] -> [batch]."""
    error = (x - mean) * jnp.exp(-log_scale)
    return _total(-jnp.square(error) / 2 - log_scale - math.log(2 * math.pi) / 2)


def _total(nats: jax.Array) -> jax.Array:
    return jnp.sum(nats, range(1, nats.ndim))
