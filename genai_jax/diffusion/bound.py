"""The variational bound on the likelihood of discrete data (Kingma et al. 2021, VDM)."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from genai_jax.diffusion.objective import noised
from genai_jax.diffusion.parameterization import convert
from genai_jax.diffusion.schedule import Schedule, derivative
from genai_jax.diffusion.times import quantiles

Predict = Callable[[jax.Array, jax.Array], jax.Array]


class Bound(NamedTuple):
    """Nats per example, [batch]; the three terms sum to an upper bound on -log p(x)."""

    diffusion: jax.Array
    prior: jax.Array
    reconstruction: jax.Array


def variational_bound(
    predict: Predict,
    schedule: Schedule,
    x0: jax.Array,
    key: jax.Array,
    *,
    parameterization: str,
    levels: int,
    sigma_data: float = 0.5,
) -> Bound:
    """An unbiased estimate of the bound, with one time per example.

    Args:
      predict: (x, t) -> the network's output.
      schedule: variance-preserving, with finite log-SNR at both ends. A discrete one gives the
        bound for `num_times` steps.
      x0: data in [-1, 1] with `levels` equally spaced values, [batch, ...].
      key: key for the times and the noise.
      parameterization: what the network predicts.
      levels: number of values.
      sigma_data: standard deviation of the data, for "edm".
    """
    time_key, noise_key, data_key = jax.random.split(key, 3)
    t = quantiles(time_key, x0.shape[0], True).astype(x0.dtype)
    if schedule.num_times:
        t = jnp.ceil(t * schedule.num_times) / schedule.num_times
    noise = jax.random.normal(noise_key, x0.shape, x0.dtype)
    x = noised(schedule, x0, t, noise)
    eps = convert(predict(x, t), parameterization, "eps", x, schedule, t, sigma_data=sigma_data)
    error = jnp.sum(jnp.square(noise - eps), tuple(range(1, x0.ndim)))
    return Bound(
        diffusion_weight(schedule, t) * error,
        prior(schedule, x0),
        -log_reconstruction(schedule, x0, data_key, levels),
    )


def diffusion_weight(schedule: Schedule, t: jax.Array) -> jax.Array:
    """The weight of |eps - eps_hat|^2 at time t, for t uniform over the schedule's times.

    Half the rate of change of gamma = -log-SNR: its derivative in continuous time (VDM, equation
    17), and num_times expm1(gamma(t) - gamma(s)) for a step from s to t (equation 14).
    """
    gamma = lambda t: -schedule.log_snr(t)
    if not schedule.num_times:
        return derivative(gamma, t) / 2
    s = t - 1 / schedule.num_times
    return schedule.num_times / 2 * jnp.expm1(gamma(t) - gamma(jnp.maximum(s, 0)))


def prior(schedule: Schedule, x0: jax.Array) -> jax.Array:
    """KL(q(x_1 | x0) || N(0, 1)), nats [batch]."""
    end = jnp.ones((), x0.dtype)
    variance = jnp.square(schedule.sigma(end))
    mean = schedule.alpha(end) * x0
    kl = (variance + jnp.square(mean) - 1 - jnp.log(variance)) / 2
    return jnp.sum(kl, tuple(range(1, x0.ndim)))


def log_reconstruction(schedule: Schedule, x0: jax.Array, key: jax.Array, levels: int) -> jax.Array:
    """log p(x0 | x_(t=0)), nats [batch].

    The decoder is categorical over the levels, with probabilities proportional to the likelihood
    of the noisy value given each level (VDM, equation 16 and appendix F).
    """
    start = jnp.zeros((), x0.dtype)
    noise_level = jnp.exp(-schedule.log_snr(start) / 2)  # sigma / alpha
    z = x0 + noise_level * jax.random.normal(key, x0.shape, x0.dtype)
    values = jnp.linspace(-1, 1, levels, dtype=x0.dtype)
    logits = -jnp.square((z[..., None] - values) / noise_level) / 2
    index = jnp.round((x0 + 1) * ((levels - 1) / 2)).astype(jnp.int32)
    logit = jnp.take_along_axis(logits, index[..., None], -1)[..., 0]
    log_probability = logit - jax.nn.logsumexp(logits, -1)
    return jnp.sum(log_probability, tuple(range(1, x0.ndim)))


def bits_per_dim(nats: jax.Array, dimensions: int) -> jax.Array:
    return nats / (dimensions * math.log(2))
