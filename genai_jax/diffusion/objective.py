"""Training losses, as pure functions of a network's prediction.

`predict(x, t)` gives the network's output [batch, ...] in its own parameterization, for noisy data
x [batch, ...] at times t [batch].
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from genai_jax.diffusion.parameterization import coefficients, conversion
from genai_jax.diffusion.schedule import Schedule
from genai_jax.diffusion.weighting import log_weight

Predict = Callable[[jax.Array, jax.Array], jax.Array]


def per_example(t: jax.Array, x: jax.Array) -> jax.Array:
    """t [batch] reshaped to broadcast against x [batch, ...]."""
    return t.reshape(-1, *(1,) * (x.ndim - 1))


def mean_square(x: jax.Array) -> jax.Array:
    """The mean square of each example, [batch]."""
    return jnp.mean(jnp.square(x), tuple(range(1, x.ndim)))


def noised(schedule: Schedule, x0: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
    """alpha x0 + sigma noise, each example of [batch, ...] at its own time."""
    return per_example(schedule.alpha(t), x0) * x0 + per_example(schedule.sigma(t), x0) * noise


def target(
    parameterization: str, schedule: Schedule, x0, noise, t, *, sigma_data: float = 0.5
) -> jax.Array:
    """What the network should predict: its target in the given parameterization, [batch, ...]."""
    a, b = coefficients(parameterization, schedule, t, sigma_data)
    return per_example(a, x0) * x0 + per_example(b, x0) * noise


def denoising_loss(
    predict: Predict,
    schedule: Schedule,
    x0: jax.Array,
    t: jax.Array,
    key: jax.Array,
    *,
    parameterization: str,
    weighting: str = "output",
    sigma_data: float = 0.5,
) -> jax.Array:
    """The weighted mean squared error of each example, [batch].

    Args:
      predict: the network.
      schedule: the noise schedule.
      x0: data [batch, ...].
      t: times [batch].
      key: key for the noise.
      parameterization: what the network predicts.
      weighting: one of `genai_jax.diffusion.weighting.WEIGHTINGS`.
      sigma_data: standard deviation of the data, for "edm".
    """
    noise = jax.random.normal(key, x0.shape, x0.dtype)
    output = predict(noised(schedule, x0, t, noise), t)
    expected = target(parameterization, schedule, x0, noise, t, sigma_data=sigma_data)
    error = mean_square(output - expected)
    if weighting == "output":
        return error
    # x0_hat - x0 is `gain` times the error of the output. The product is taken in logarithms, since
    # at the ends one factor vanishes while the other grows without bound.
    _, gain = conversion(parameterization, "x0", schedule, t, sigma_data=sigma_data)
    log_snr = schedule.log_snr(t)
    weight = jnp.exp(log_weight(weighting, log_snr, sigma_data) + 2 * jnp.log(jnp.abs(gain)))
    return weight * error


def flow_matching_loss(
    predict: Predict, schedule: Schedule, x0: jax.Array, t: jax.Array, key: jax.Array
) -> jax.Array:
    """The mean squared error of the velocity dx_t / dt, [batch].

    Conditional flow matching (Lipman et al. 2023, equation 9), which for the straight path is the
    rectified flow of Liu et al. 2023, equation 1, with time running from data to noise.
    """
    return denoising_loss(predict, schedule, x0, t, key, parameterization="velocity")
