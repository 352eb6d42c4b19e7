"""Times: those that training draws and those that a solver steps through."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri

from genai_jax.diffusion.schedule import Schedule, snap

SPACINGS = ("uniform", "quadratic", "log_snr", "rho")
FARTHEST = 7.0  # |log(sigma / alpha)| within which a grid in noise levels keeps its steps
FAR = 1e-5  # training stays this far from both ends, where a target may be infinite


def uniform(quantile, schedule, mean, std):
    """Uniform on [0, 1]."""
    del schedule, mean, std
    return quantile


def logit_normal(quantile, schedule, mean, std):
    """The logit of t is normal: more of the middle (Esser et al. 2024, equation 19)."""
    del schedule
    return jax.nn.sigmoid(mean + std * ndtri(quantile))


def log_normal(quantile, schedule, mean, std):
    """The logarithm of sigma / alpha is normal (Karras et al. 2022, table 1)."""
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
      key: of the draw.
      count: the number of examples.
      schedule: of the noise; a discrete one gives its own times.
      mean: of the normal that the distribution is made of.
      std: of the same.
      low_discrepancy: quantiles u + i / count, modulo 1, with one random offset u (Kingma et al.
        2021, appendix I.1), which spreads the times evenly and leaves each of them as likely.
    """
    quantile = quantiles(key, count, low_discrepancy)
    t = TIME_DISTRIBUTIONS[name](quantile, schedule, mean, std)
    return snap(schedule, jnp.clip(t, FAR, 1 - FAR))


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
      schedule: of the noise. The steps of a discrete one begin at its own times, which are snapped
        to, and end at `end`.
      steps: of the solver.
      spacing: "uniform" or "quadratic" in t, "log_snr" uniform in log-SNR, "rho" uniform in the
        rho-th root of sigma / alpha (Karras et al. 2022, equation 5). The last two take the first
        and the last step from finite values, so that the end points themselves are hit.
      start: largest time.
      end: smallest time.
      rho: of the spacing of that name.

    Raises:
      ValueError: an unknown spacing, no room between start and end, or more steps than times.
    """
    if not 0 <= end < start <= 1:
        raise ValueError(f"times from start={start} to end={end} do not decrease within [0, 1]")
    if schedule.num_times and steps > schedule.num_times * (start - end) + 1e-6:
        raise ValueError(
            f"{steps} steps are more than the schedule has: {schedule.num_times} times in [0, 1], "
            f"of which {int(schedule.num_times * (start - end) + 1e-6)} are in use"
        )
    unit = np.linspace(0.0, 1.0, steps + 1)
    if spacing == "uniform":
        t = jnp.asarray(start + (end - start) * unit)
    elif spacing == "quadratic":
        t = jnp.asarray(end + (start - end) * (1 - unit) ** 2)
    elif spacing in ("log_snr", "rho"):
        t = _in_noise(schedule, unit, start, end, rho if spacing == "rho" else None)
    else:
        raise ValueError(f"spacing {spacing!r} is not one of {', '.join(SPACINGS)}")
    if schedule.num_times:
        t = _distinct(schedule, t, end)
    return t.astype(jnp.promote_types(t.dtype, jnp.float32))


def _in_noise(schedule, unit, start, end, rho):
    """Times at which the log of the noise-to-signal ratio, or its root, is equally spaced."""
    ends = jnp.asarray([start, end]) * 1.0
    exact, inside = schedule.log_snr(ends), schedule.log_snr(jnp.clip(ends, 1e-4, 1 - 1e-4))
    noise = -jnp.where(jnp.isfinite(exact), exact, inside) / 2  # log(sigma / alpha)
    noise = jnp.clip(noise, -FARTHEST, FARTHEST)
    if rho:
        root = jnp.exp(noise / rho)
        levels = rho * jnp.log(root[0] + (root[1] - root[0]) * unit)
    else:
        levels = noise[0] + (noise[1] - noise[0]) * unit
    t = schedule.time(-2 * levels)
    return t.at[0].set(start).at[-1].set(end)


def _distinct(schedule, t, end):
    """The times snapped to those of a discrete schedule, pushed apart where two coincide."""
    count = schedule.num_times
    steps = t.shape[0] - 1
    index = jnp.clip(jnp.round(t[:-1] * count), 1, count)
    # From the last one upwards each is above the next, then from the first downwards below it.
    floor = jnp.arange(steps, 0, -1) + jnp.round(end * count)
    index = jnp.maximum(index, floor)
    offset = index + jnp.arange(steps)
    index = jax.lax.cummin(offset) - jnp.arange(steps)
    return jnp.append(index / count, end)
