"""Exact log-density through the probability-flow ODE (Song et al. 2021, equation 39)."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from genai_jax.diffusion.schedule import Schedule

Denoise = Callable[[jax.Array, jax.Array], jax.Array]
DIVERGENCES = ("exact", "hutchinson")
FAR = 1e-4  # the ODE keeps this far from an end where log-SNR is infinite


def log_density(
    denoise: Denoise,
    schedule: Schedule,
    x: jax.Array,
    *,
    steps: int = 100,
    divergence: str = "exact",
    key: jax.Array | None = None,
    num_probes: int = 1,
    data_std: float = 1.0,
) -> jax.Array:
    """log p(x) of the model, nats [batch].

    With y = x_t / alpha and u = log(sigma / alpha) the ODE is dy/du = y - x0_hat: smooth, whatever
    the schedule. It is solved by classical Runge-Kutta in equal steps of u, together with the
    divergence. x is taken to have the noise of the smallest sigma, which blurs the density by that
    much; at the largest sigma the prior is normal with variance sigma^2 + (alpha data_std)^2.

    Args:
      denoise: (x, t) -> x0.
      schedule: of the noise.
      x: [batch, ...].
      steps: of the solver, four evaluations each.
      divergence: "exact", one Jacobian-vector product for each dimension, or "hutchinson", an
        unbiased estimate by random signs (Hutchinson 1990; Grathwohl et al. 2019).
      key: of the estimate.
      num_probes: random directions of the estimate.
      data_std: standard deviation of the data, of the prior.
    """
    probes = _probes(x, divergence, key, num_probes)
    ends = _finite_ends(schedule, x.dtype)
    u_start, u_end = (-schedule.log_snr(t) / 2 for t in ends)
    size = (u_end - u_start) / steps
    axes = tuple(range(1, x.ndim))

    def slope(y, u):
        t = jnp.broadcast_to(schedule.time(-2 * u), x.shape[:1]).astype(x.dtype)
        alpha = schedule.alpha(t).reshape(-1, *(1,) * (x.ndim - 1))
        field = lambda y: y - denoise(alpha * y, t)
        through = lambda probe: jnp.sum(probe * jax.jvp(field, (y,), (probe,))[1], axes)
        trace = jnp.sum(jax.lax.map(through, probes), 0)
        if divergence == "hutchinson":
            trace = trace / num_probes
        return field(y), trace

    def step(carry, i):
        y, gained = carry
        u = u_start + i * size
        k1, d1 = slope(y, u)
        k2, d2 = slope(y + size / 2 * k1, u + size / 2)
        k3, d3 = slope(y + size / 2 * k2, u + size / 2)
        k4, d4 = slope(y + size * k3, u + size)
        y = y + size / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return (y, gained + size / 6 * (d1 + 2 * d2 + 2 * d3 + d4)), None

    begin = (x / schedule.alpha(ends[0]), jnp.zeros(x.shape[:1], x.dtype))
    (y, gained), _ = jax.lax.scan(step, begin, jnp.arange(steps))
    # Densities of y = x / alpha; the first change of variables is that of the data.
    dimensions = x[0].size
    variance = jnp.exp(2 * u_end) + data_std**2
    log_prior = -jnp.sum(jnp.square(y), axes) / (2 * variance)
    log_prior -= dimensions / 2 * jnp.log(2 * math.pi * variance)
    return log_prior + gained - dimensions * jnp.log(schedule.alpha(ends[0]))


def _probes(x, divergence, key, num_probes):
    """Directions [probes, batch, ...] whose quadratic forms sum to the divergence."""
    if divergence == "exact":
        count = x[0].size
        basis = jnp.eye(count, dtype=x.dtype).reshape(count, 1, *x.shape[1:])
        return jnp.broadcast_to(basis, (count, *x.shape))
    if divergence != "hutchinson":
        raise ValueError(f"divergence {divergence!r} is not one of {', '.join(DIVERGENCES)}")
    return jax.random.rademacher(key, (num_probes, *x.shape), x.dtype)


def _finite_ends(schedule, dtype):
    ends = jnp.array([0, 1], dtype)
    inside = jnp.clip(ends, FAR, 1 - FAR)
    return jnp.where(jnp.isfinite(schedule.log_snr(ends)), ends, inside)
