"""Stochastic solvers: the reverse SDE and Langevin dynamics."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from genai_jax.diffusion.schedule import derivative, diffusion_squared
from genai_jax.diffusion.steps import Interval, eps_of, intervals, step_noise

CORRECTIONS = 5  # Langevin steps at each noise level of "langevin"


class Sde(NamedTuple):
    """The reverse process dx = (a x0 + b epsilon) dt + noise: see `prepare_sde`."""

    step: Interval
    a: jax.Array
    b: jax.Array
    noise: jax.Array


def prepare_sde(schedule, times):
    """Euler-Maruyama on the reverse SDE (Song et al. 2021, equation 6).

    Its drift is that of the probability-flow ODE plus c^2 epsilon / (2 sigma) for noise of rate c;
    for any c, the marginals are those of the forward process. Here c is g, limited so that a single
    step adds at most the variance sigma^2: if a schedule ends without signal, g is infinite at
    t = 1.
    """
    step = intervals(schedule, times)
    size = step.t_next - step.t  # negative
    rate = diffusion_squared(schedule, step.t)
    limit = jnp.square(step.sigma) / jnp.abs(size)
    rate = jnp.where(jnp.isfinite(rate), jnp.clip(rate, 0, limit), limit)
    a = derivative(schedule.alpha, step.t) * size
    b = (derivative(schedule.sigma, step.t) + rate / (2 * step.sigma)) * size
    noise = jnp.sqrt(rate * jnp.abs(size))
    return Sde(step, a, b, noise)


def advance_sde(denoise, carry, sde: Sde, key):
    (x,) = carry
    x0 = denoise(x, sde.step.t)
    noise = jax.random.normal(key, x.shape, x.dtype)
    return (x + sde.a * x0 + sde.b * eps_of(x, x0, sde.step) + sde.noise * noise,)


def _langevin(x, x0, alpha, sigma, snr, key):
    """One Langevin step at a noise level: x + h score + sqrt(2 h) z with h = 2 (snr sigma)^2.

    Song et al. 2021, algorithm 4, with |z| / |score| replaced by sigma, its value for a perfect
    score.
    """
    noise = jax.random.normal(key, x.shape, x.dtype)
    eps = (x - alpha * x0) / jnp.where(sigma > 0, sigma, 1.0)
    x_new = x - 2 * jnp.square(snr) * sigma * eps + 2 * snr * sigma * noise
    return jnp.where(sigma > 0, x_new, x)


def prepare_corrector(schedule, times, snr: float = 0.16):
    step = intervals(schedule, times)
    return step, jnp.full(step.t.shape, snr, step.t.dtype)


def advance_corrector(denoise, carry, coefficients, key):
    """An ancestral step, then a Langevin step at the noise level that it arrives at."""
    (x,) = carry
    step, snr = coefficients
    predict_key, correct_key = jax.random.split(key)
    x0 = denoise(x, step.t)
    deviation = step_noise(step)
    kept = jnp.sqrt(jnp.maximum(jnp.square(step.sigma_next) - jnp.square(deviation), 0))
    noise = jax.random.normal(predict_key, x.shape, x.dtype)
    x = step.alpha_next * x0 + kept * eps_of(x, x0, step) + deviation * noise
    x0 = denoise(x, step.t_next)
    return (_langevin(x, x0, step.alpha_next, step.sigma_next, snr, correct_key),)


def prepare_langevin(schedule, times, snr: float = 0.16):
    return prepare_corrector(schedule, times, snr)


def advance_langevin(denoise, carry, coefficients, key):
    """Annealed Langevin dynamics (Song and Ermon 2019, algorithm 1): several steps at each level.

    Between noise levels, x follows the ODE to the next one. With a constant signal and small steps,
    that hardly moves it.
    """
    (x,) = carry
    step, snr = coefficients

    def correct(i, x):
        x0 = denoise(x, step.t)
        return _langevin(x, x0, step.alpha, step.sigma, snr, jax.random.fold_in(key, i))

    x = jax.lax.fori_loop(0, CORRECTIONS - 1, correct, x)
    x0 = denoise(x, step.t)
    return (step.alpha_next * x0 + step.sigma_next * eps_of(x, x0, step),)
