"""Times: random ones for training, and the grid that a solver steps through."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri

from genai_jax.diffusion.schedule import FAR, Schedule, snap

SPACINGS = ("uniform", "quadratic", "log_snr", "rho")
MAX_LOG_NOISE = 7.0  # grids over noise levels are limited to |log(sigma / alpha)| up to this
MARGIN = 1e-5  # training times stay this far from both ends, where a target may be infinite


def uniform(quantile, schedule, mean, std):
    """Uniform on [0, 1]."""
    del schedule, mean, std
    return quantile


def logit_normal(quantile, schedule, mean, std):
    """A normal logit of t, which favors the middle (Esser et al. 2024, equation 19)."""
    del schedule
    return jax.nn.sigmoid(mean + std * ndtri(quantile))


def log_normal(quantile, schedule, mean, std):
    """A normal logarithm of sigma / alpha (Karras et al. 2022, table 1)."""
    return schedule.time(-2 * (mean + std * ndtri(quantile)))


TIME_DISTRIBUTIONS = {"uniform": uniform, "logit_normal": logit_normal, "log_normal": log_normal}


def sample_times(
    name: str,
    key: jax.Array,
    count: int,
    schedule: Schedule,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    low_discrepancy: bool = True,
) -> jax.Array:
    """Random training times [count], float32.

    Args:
      name: one of `TIME_DISTRIBUTIONS`.
      key: random key.
      count: the number of examples.
      schedule: the noise schedule; for a discrete one, the times are its own.
      mean: mean of the underlying normal distribution.
      std: standard deviation of the underlying normal distribution.
      low_discrepancy: use the quantiles u + i / count, modulo 1, with one random offset u (Kingma
        et al. 2021, appendix I.1). They spread the times evenly without changing the distribution
        of each.
    """
    quantile = quantiles(key, count, low_discrepancy)
    t = TIME_DISTRIBUTIONS[name](quantile, schedule, mean, std)
    return snap(schedule, jnp.clip(t, MARGIN, 1 - MARGIN))


def quantiles(key: jax.Array, count: int, low_discrepancy: bool) -> jax.Array:
    """Uniform numbers [count] in (0, 1), evenly spread if `low_discrepancy`."""
    if low_discrepancy:
        u = (jax.random.uniform(key) + jnp.arange(count) / count) % 1.0
    else:
        u = jax.random.uniform(key, (count,))
    return jnp.clip(u, 1e-6, 1 - 1e-6)


def time_grid(
    schedule: Schedule,
    steps: int,
    spacing: str = "uniform",
    *,
    start: float = 1.0,
    end: float = 0.0,
    rho: float = 7.0,
) -> jax.Array:
    """Decreasing times [steps + 1] of a solver, from `start` to `end`.

    Args:
      schedule: the noise schedule. For a discrete one, every step begins at one of its own times
        (the grid is rounded to them), and the last one ends at `end`.
      steps: number of solver steps.
      spacing: "uniform" or "quadratic" in t, "log_snr" uniform in log-SNR, "rho" uniform in the
        rho-th root of sigma / alpha (Karras et al. 2022, equation 5). The last two space the inner
        times between finite noise levels; the first and last time are `start` and `end` exactly.
      start: largest time.
      end: smallest time.
      rho: parameter of the spacing "rho".

    Raises:
      ValueError: an unknown spacing, `start` and `end` not decreasing within [0, 1], or more steps
        than a discrete schedule has times.
    """
    if not 0 <= end < start <= 1:
        raise ValueError(f"times from start={start} to end={end} must decrease within [0, 1]")
    if schedule.num_times and steps > schedule.num_times * (start - end) + 1e-6:
        raise ValueError(
            f"{steps} steps are too many for a discrete schedule with {schedule.num_times} times, "
            f"of which {int(schedule.num_times * (start - end) + 1e-6)} are between {end} and "
            f"{start}"
        )
    unit = np.linspace(0.0, 1.0, steps + 1)
    if spacing == "uniform":
        t = jnp.asarray(start + (end - start) * unit)
    elif spacing == "quadratic":
        t = jnp.asarray(end + (start - end) * (1 - unit) ** 2)
    elif spacing in ("log_snr", "rho"):
        t = _spaced_in_noise(schedule, unit, start, end, rho if spacing == "rho" else None)
    else:
        raise ValueError(f"spacing {spacing!r} is not one of {', '.join(SPACINGS)}")
    if schedule.num_times:
        t = _distinct(schedule, t, end)
    return t.astype(jnp.promote_types(t.dtype, jnp.float32))


def inverse_grid(schedule: Schedule, times: jax.Array) -> jax.Array:
    """The times of a solver in increasing order, to go from data to noise.

    Data without noise does not say which noise it came from, so a first time at which sigma is 0
    becomes a small time, at which the data is taken to be.
    """
    times = times[::-1]
    small = jnp.minimum(FAR, times[1] / 2)
    return times.at[0].set(jnp.where(schedule.sigma(times[0]) > 0, times[0], small))


def _spaced_in_noise(schedule, unit, start, end, rho):
    """Times at which the log of the noise-to-signal ratio, or its rho-th root, is evenly spaced."""
    ends = jnp.asarray([start, end]) * 1.0
    exact, inside = schedule.log_snr(ends), schedule.log_snr(jnp.clip(ends, 1e-4, 1 - 1e-4))
    noise = -jnp.where(jnp.isfinite(exact), exact, inside) / 2  # log(sigma / alpha)
    noise = jnp.clip(noise, -MAX_LOG_NOISE, MAX_LOG_NOISE)
    if rho:
        root = jnp.exp(noise / rho)
        levels = rho * jnp.log(root[0] + (root[1] - root[0]) * unit)
    else:
        levels = noise[0] + (noise[1] - noise[0]) * unit
    t = schedule.time(-2 * levels)
    return t.at[0].set(start).at[-1].set(end)


def _distinct(schedule, t, end):
    """The times rounded to those of a discrete schedule, moved apart where two coincide."""
    count = schedule.num_times
    steps = t.shape[0] - 1
    index = jnp.clip(jnp.round(t[:-1] * count), 1, count)
    # First raise indices so that all can decrease down to the end, then lower duplicates.
    floor = jnp.arange(steps, 0, -1) + jnp.round(end * count)
    index = jnp.maximum(index, floor)
    offset = index + jnp.arange(steps)
    index = jax.lax.cummin(offset) - jnp.arange(steps)
    return jnp.append(index / count, end)
