"""Guidance: denoisers in, a denoiser out. All act on every channel alike."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from genai_jax.diffusion.schedule import Schedule

Denoise = Callable[[jax.Array, jax.Array], jax.Array]


def classifier_free(conditional: Denoise, unconditional: Denoise, weight: float) -> Denoise:
    """unconditional + weight (conditional - unconditional) (Ho and Salimans 2022, equation 6).

    Their w is weight - 1. Weights 1 and 0 are the conditional and the unconditional model
    themselves, and evaluate no other.
    """
    return _extrapolated(unconditional, conditional, weight)


def autoguidance(strong: Denoise, weak: Denoise, weight: float) -> Denoise:
    """Away from a weaker version of the same model: weak + weight (strong - weak).

    Karras et al. 2024, "Guiding a diffusion model with a bad version of itself", equation 3.
    """
    return _extrapolated(weak, strong, weight)


def _extrapolated(origin: Denoise, towards: Denoise, weight: float) -> Denoise:
    if weight == 1:
        return towards
    if weight == 0:
        return origin

    def denoise(x, t):
        start = origin(x, t)
        return start + weight * (towards(x, t) - start)

    return denoise


def rescaled(guided: Denoise, plain: Denoise, share: float) -> Denoise:
    """The contrast of the guided estimate drawn back towards that of the plain one.

    Lin et al. 2024, equations 15 and 16: each example is scaled to the standard deviation of its
    plain estimate, and mixed with the unscaled by `share` (their phi).
    """

    def denoise(x, t):
        estimate, reference = guided(x, t), plain(x, t)
        axes = tuple(range(1, x.ndim))
        deviation = lambda y: jnp.std(y, axes, keepdims=True)
        scale = deviation(reference) / jnp.maximum(deviation(estimate), 1e-8)
        return estimate * (share * scale + 1 - share)

    return denoise


def limited_interval(
    guided: Denoise, plain: Denoise, schedule: Schedule, low: float, high: float
) -> Denoise:
    """`guided` where low <= log-SNR <= high, `plain` elsewhere (Kynkäänniemi et al. 2024).

    All examples of a solver's step share one time, so a branch saves the second evaluation.
    """

    def denoise(x, t):
        log_snr = schedule.log_snr(jnp.ravel(t)[0])
        return jax.lax.cond((low <= log_snr) & (log_snr <= high), guided, plain, x, t)

    return denoise
