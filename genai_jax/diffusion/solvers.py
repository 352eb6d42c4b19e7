"""Solvers of the reverse process: from noise to data, or back, along given times.

A solver consists of three pure functions. `prepare` turns the schedule and the times into the
coefficients of all steps at once, arrays [steps, ...]; `begin` makes the carry: the state x, then
the history of a multistep method; `advance` takes one step. `solve` scans over the steps, so that
each costs only its network evaluations and one pass over x.

`denoise(x, t)` gives the expected data x0 for x [batch, ...] and times t [batch].
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from genai_jax.diffusion import multistep, stochastic
from genai_jax.diffusion.schedule import Schedule
from genai_jax.diffusion.steps import Interval, eps_of, intervals, step_noise

Denoise = Callable[[jax.Array, jax.Array], jax.Array]


class Solver(NamedTuple):
    """The functions of a solver; see the module."""

    prepare: Callable[..., Any]  # (schedule, times, **options) -> coefficients
    advance: Callable[..., tuple]  # (denoise, carry, coefficients, key) -> carry
    evaluations: int = 1  # network evaluations per step
    begin: Callable[[jax.Array], tuple] = lambda x: (x,)


def solve(
    name: str,
    denoise: Denoise,
    schedule: Schedule,
    x: jax.Array,
    times: jax.Array,
    key: jax.Array,
    *,
    return_path: bool = False,
    **options: float,
) -> Any:
    """Solves from x [batch, ...] at times[0] along `times` [steps + 1]; decreasing towards data.

    Args:
      name: one of `SOLVERS`.
      denoise: the model, guided or not.
      schedule: the noise schedule.
      x: state at times[0].
      times: decreasing; a deterministic solver also takes increasing times.
      key: key for the noise; a deterministic solver ignores it.
      return_path: whether to return all states as well.
      **options: the solver's own: `eta` for ddim; `s_churn`, `s_min`, `s_max`, `s_noise` for heun;
        `snr` for predictor_corrector and langevin.

    Returns:
      The state at times[-1]; with `return_path` also the states at all times,
      [steps + 1, batch, ...].
    """
    solver = SOLVERS[name]
    times = times.astype(x.dtype)
    coefficients = solver.prepare(schedule, times, **options)
    rows = x.shape[0]
    at = lambda x, t: denoise(x, jnp.broadcast_to(t, (rows,)))

    def body(carry, inputs):
        carry = solver.advance(at, carry, *inputs)
        return carry, carry[0] if return_path else None

    count = jax.tree.leaves(coefficients)[0].shape[0]
    keys = jax.random.split(key, count)
    carry, path = jax.lax.scan(body, solver.begin(x), (coefficients, keys))
    if not return_path:
        return carry[0]
    # A method that repeats its first step has one state too many.
    return carry[0], jnp.concatenate([x[None], path[-(times.shape[0] - 1) :]])


# Ancestral sampling, and its deterministic relative.


def _ddpm(denoise, carry, step: Interval, key):
    """Samples the posterior q(x_next | x, x0_hat) (Ho et al. 2020, equation 7).

    In the general form of Kingma et al. 2021, equation 25.
    """
    (x,) = carry
    x0 = denoise(x, step.t)
    ratio = step.alpha / step.alpha_next  # alpha of the forward step from t_next to t
    shrinkage = jnp.square(step.sigma_next / step.sigma)
    variance = jnp.square(step.sigma) - jnp.square(ratio * step.sigma_next)  # of that step
    mean = ratio * shrinkage * x + step.alpha_next * (1 - jnp.square(ratio) * shrinkage) * x0
    noise = jax.random.normal(key, x.shape, x.dtype)
    return (mean + jnp.sqrt(jnp.maximum(variance * shrinkage, 0)) * noise,)


def _prepare_ddim(schedule, times, eta: float = 0.0):
    return intervals(schedule, times), jnp.full(times.shape[0] - 1, eta, times.dtype)


def _ddim(denoise, carry, coefficients, key):
    """Song et al. 2021 (DDIM), equation 12: eta 0 is deterministic, 1 is ancestral sampling."""
    (x,) = carry
    step, eta = coefficients
    x0 = denoise(x, step.t)
    deviation = eta * step_noise(step)
    kept = jnp.sqrt(jnp.maximum(jnp.square(step.sigma_next) - jnp.square(deviation), 0))
    noise = jax.random.normal(key, x.shape, x.dtype)
    return (step.alpha_next * x0 + kept * eps_of(x, x0, step) + deviation * noise,)


def _renoise(denoise, carry, step: Interval, key):
    """Replaces all the noise in every step: Song et al. 2023 (consistency models), algorithm 1."""
    (x,) = carry
    noise = jax.random.normal(key, x.shape, x.dtype)
    return (step.alpha_next * denoise(x, step.t) + step.sigma_next * noise,)


# Runge-Kutta methods on the probability-flow ODE dx = x0_hat d alpha + eps_hat d sigma. The
# increments of alpha and sigma are exact, so a schedule that is steep at an end adds no error.


def _euler(denoise, carry, step: Interval, key):
    """With exact increments, Euler's method is deterministic DDIM for every schedule."""
    del key
    (x,) = carry
    x0 = denoise(x, step.t)
    return (x + _increment(step, x0, eps_of(x, x0, step)),)


def _increment(step: Interval, x0, eps):
    return (step.alpha_next - step.alpha) * x0 + (step.sigma_next - step.sigma) * eps


class Churn(NamedTuple):
    """Raises x to the noise level at which a step begins: x * scale + deviation * noise."""

    scale: jax.Array
    deviation: jax.Array


def _prepare_heun(
    schedule, times, s_churn: float = 0.0, s_min: float = 0.0, s_max: float = float("inf"),
    s_noise: float = 1.0,
):  # fmt: skip
    """Steps that begin at a raised noise level (Karras et al. 2022, algorithm 2)."""
    step = intervals(schedule, times)
    level = step.sigma / step.alpha
    raised = min(s_churn / (times.shape[0] - 1), 2**0.5 - 1)
    gamma = jnp.where((level >= s_min) & (level <= s_max), raised, 0.0)
    if s_churn:
        up = schedule.time(schedule.log_snr(step.t) - 2 * jnp.log1p(gamma))
        up = jnp.where((gamma > 0) & jnp.isfinite(level), up, step.t)
    else:
        up = step.t
    alpha, sigma = schedule.alpha(up), schedule.sigma(up)
    scale = jnp.where(step.alpha > 0, alpha / step.alpha, 1.0)
    added = jnp.maximum(jnp.square(sigma) - jnp.square(scale * step.sigma), 0)
    churn = Churn(scale, s_noise * jnp.sqrt(added))
    return step._replace(t=up, alpha=alpha, sigma=sigma), churn


def _heun(denoise, carry, coefficients, key):
    """A trapezoidal step, or an Euler step if it ends without noise.

    If the signal is constant, it is the step of Karras et al. 2022, algorithm 2.
    """
    (x,) = carry
    step, churn = coefficients
    x = churn.scale * x + churn.deviation * jax.random.normal(key, x.shape, x.dtype)
    x0 = denoise(x, step.t)
    eps = eps_of(x, x0, step)
    predicted = x + _increment(step, x0, eps)
    x0_next = denoise(predicted, step.t_next)
    usable = step.sigma_next > 0
    sigma = jnp.where(usable, step.sigma_next, 1.0)
    eps_next = (predicted - step.alpha_next * x0_next) / sigma
    corrected = x + _increment(step, (x0 + x0_next) / 2, (eps + eps_next) / 2)
    return (jnp.where(usable, corrected, predicted),)


SOLVERS: dict[str, Solver] = {
    "ddpm": Solver(intervals, _ddpm),
    "ddim": Solver(_prepare_ddim, _ddim),
    "consistency": Solver(intervals, _renoise),
    "euler": Solver(intervals, _euler),
    "heun": Solver(_prepare_heun, _heun, 2),
    "dpmpp_2m": Solver(multistep.prepare_2m, multistep.advance_2m, 1, multistep.begin_2m),
    "dpmpp_3m": Solver(multistep.prepare_3m, multistep.advance_3m, 1, multistep.begin_3m),
    "unipc": Solver(multistep.prepare_unipc, multistep.advance_unipc, 1, multistep.begin_unipc),
    "euler_maruyama": Solver(stochastic.prepare_sde, stochastic.advance_sde),
    "predictor_corrector": Solver(stochastic.prepare_corrector, stochastic.advance_corrector, 2),
    "langevin": Solver(
        stochastic.prepare_langevin, stochastic.advance_langevin, stochastic.CORRECTIONS
    ),
}
