"""The steps of a solver: the schedule at both ends of each."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from genai_jax.diffusion.schedule import Schedule


class Interval(NamedTuple):
    """Steps from t to t_next, each [steps]."""

    t: jax.Array
    t_next: jax.Array
    alpha: jax.Array
    alpha_next: jax.Array
    sigma: jax.Array
    sigma_next: jax.Array


def intervals(schedule: Schedule, times: jax.Array) -> Interval:
    """The steps of `times` [steps + 1]."""
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    return Interval(times[:-1], times[1:], alpha[:-1], alpha[1:], sigma[:-1], sigma[1:])


def eps_of(x: jax.Array, x0: jax.Array, step: Interval) -> jax.Array:
    """The noise in x at the start of the step if the data is x0."""
    return (x - step.alpha * x0) / step.sigma


def step_noise(step: Interval) -> jax.Array:
    """Standard deviation of the noise that ancestral sampling adds in each step."""
    ratio = step.alpha / step.alpha_next
    added = jnp.square(step.sigma) - jnp.square(ratio * step.sigma_next)
    return step.sigma_next / step.sigma * jnp.sqrt(jnp.maximum(added, 0))


def half_log_snr_steps(schedule: Schedule, times: jax.Array) -> jax.Array:
    """Increase of log(alpha / sigma) over each step, [steps]; infinite where it is at an end."""
    return jnp.diff(schedule.log_snr(times)) / 2
