"""Converts between all quantities that a network may predict.

Each target is a combination a x0 + b epsilon whose two coefficients depend only on the time.
Together with x_t = alpha x0 + sigma epsilon these are two linear equations for x0 and epsilon, so
any target determines every other.
"""

import jax
import jax.numpy as jnp

from genai_jax.diffusion.schedule import Schedule, derivative

PARAMETERIZATIONS = ("eps", "x0", "v", "score", "velocity", "edm")


def coefficients(
    target: str, schedule: Schedule, t: jax.Array, sigma_data: float = 0.5
) -> tuple[jax.Array, jax.Array]:
    """(a, b) of a target a x0 + b epsilon, each shaped as t.

    Args:
      target: "x0"; "eps"; "v" = (alpha eps - sigma x0) / sqrt(alpha^2 + sigma^2) (Salimans and Ho
        2022, if the variance is preserved); "score" = -eps / sigma; "velocity" = dx_t / dt;
        "edm", the network's output in the preconditioning of Karras et al. 2022, table 1.
      schedule: the noise schedule.
      t: times.
      sigma_data: standard deviation of the data, for "edm".

    Raises:
      ValueError: an unknown target.
    """
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    zero, one = jnp.zeros_like(alpha), jnp.ones_like(alpha)
    if target == "x0":
        return one, zero
    if target == "eps":
        return zero, one
    if target == "score":
        return zero, -1 / sigma
    if target == "velocity":
        return derivative(schedule.alpha, t), derivative(schedule.sigma, t)
    norm = jnp.sqrt(jnp.square(alpha) + jnp.square(sigma))
    if target == "v":
        return -sigma / norm, alpha / norm
    if target == "edm":
        # D = c_skip (x / alpha) + c_out F at the noise level sigma / alpha, solved for F in a form
        # that never divides by alpha.
        scale = jnp.sqrt(jnp.square(alpha * sigma_data) + jnp.square(sigma))
        return sigma / (scale * sigma_data), -alpha * sigma_data / scale
    raise ValueError(f"parameterization {target!r} is not one of {', '.join(PARAMETERIZATIONS)}")


def convert(
    value: jax.Array,
    source: str,
    target: str,
    x: jax.Array,
    schedule: Schedule,
    t: jax.Array,
    *,
    sigma_data: float = 0.5,
) -> jax.Array:
    """Converts a value of the quantity `source` into the quantity `target`.

    Args:
      value: [batch, ...], the value of `source`.
      source: one of `PARAMETERIZATIONS`.
      target: one of `PARAMETERIZATIONS`.
      x: [batch, ...], the noisy data at time t.
      schedule: the noise schedule.
      t: [batch] or a scalar.
      sigma_data: standard deviation of the data, for "edm".
    """
    if source == target:
        return value
    x_weight, weight = conversion(source, target, schedule, t, sigma_data=sigma_data)
    return _per_example(x_weight, x) * x + _per_example(weight, x) * value


def conversion(
    source: str, target: str, schedule: Schedule, t: jax.Array, *, sigma_data: float = 0.5
) -> tuple[jax.Array, jax.Array]:
    """(p, q) with target = p x_t + q source, each shaped as t."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    a, b = coefficients(source, schedule, t, sigma_data)
    c, d = coefficients(target, schedule, t, sigma_data)
    determinant = alpha * b - sigma * a
    return (c * b - d * a) / determinant, (d * alpha - c * sigma) / determinant


def input_scale(
    parameterization: str, schedule: Schedule, t: jax.Array, sigma_data: float = 0.5
) -> jax.Array:
    """Factor of the network's input, shaped as t: to unit variance for "edm", 1 otherwise."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    if parameterization != "edm":
        return jnp.ones_like(alpha)
    return 1 / jnp.sqrt(jnp.square(alpha * sigma_data) + jnp.square(sigma))


def _per_example(weight: jax.Array, x: jax.Array) -> jax.Array:
    """A weight per example, reshaped to broadcast against x [batch, ...]; a scalar stays one."""
    return weight if weight.ndim == 0 else weight.reshape(-1, *(1,) * (x.ndim - 1))
