"""Gaussian data, for which everything is known in closed form."""

import jax
import jax.numpy as jnp

from genai_jax.diffusion import schedule as schedules

MEAN, STD = 0.7, 0.3

# The context manager left jax.experimental in jax 0.8.
float64 = getattr(jax, "enable_x64", None)
if float64 is None:
    from jax.experimental import enable_x64 as float64

EVERY_SCHEDULE = {
    **schedules.SCHEDULES,
    "zero_terminal": lambda: schedules.zero_terminal_snr(schedules.cosine()),
}


def per_example(t, x):
    return t.reshape(-1, *(1,) * (x.ndim - 1))


def denoiser(schedule):
    """(x, t) -> the exact expectation of x0 given x, for data N(MEAN, STD^2)."""

    def denoise(x, t):
        alpha, sigma = per_example(schedule.alpha(t), x), per_example(schedule.sigma(t), x)
        gain = alpha * STD**2 / (jnp.square(alpha) * STD**2 + jnp.square(sigma))
        return MEAN + gain * (x - alpha * MEAN)

    return denoise


def exact_flow(schedule, x, t, s):
    """The exact solution of the probability-flow ODE from x at time t to time s."""
    spread = lambda t: jnp.sqrt(jnp.square(schedule.alpha(t) * STD) + jnp.square(schedule.sigma(t)))
    mean = lambda t: schedule.alpha(t) * MEAN
    return mean(s) + spread(s) / spread(t) * (x - mean(t))
