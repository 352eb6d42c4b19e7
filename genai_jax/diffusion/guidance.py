"""Guidance: combines denoisers into one denoiser. Every channel is treated the same."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from genai_jax.diffusion.schedule import Schedule

Denoise = Callable[[jax.Array, jax.Array], jax.Array]


def classifier_free(conditional: Denoise, unconditional: Denoise, weight: float) -> Denoise:
    """unconditional + weight (conditional - unconditional) (Ho and Salimans 2022, equation 6).

    Their w is weight - 1. A weight of 1 or 0 returns the conditional or the unconditional model
    itself, so that the other is never evaluated.
    """
    return _extrapolated(unconditional, conditional, weight)


def autoguidance(strong: Denoise, weak: Denoise, weight: float) -> Denoise:
    """Guides away from a weaker version of the same model: weak + weight (strong - weak).

    Karras et al. 2024, "Guiding a diffusion model with a bad version of itself", equation 3.
    """
    return _extrapolated(weak, strong, weight)


def _extrapolated(origin: Denoise, target: Denoise, weight: float) -> Denoise:
    if weight == 1:
        return target
    if weight == 0:
        return origin

    def denoise(x, t):
        start = origin(x, t)
        return start + weight * (target(x, t) - start)

    return denoise


def rescaled(guided: Denoise, plain: Denoise, share: float) -> Denoise:
    """Rescales the guided estimate towards the contrast of the plain one.

    Lin et al. 2024, equations 15 and 16: each example is scaled to the standard deviation of its
    plain estimate; the result has weight `share` (their phi), the unscaled estimate 1 - share.
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

    All examples of a solver's step share one time, so a branch avoids evaluating both.
    """

    def denoise(x, t):
        log_snr = schedule.log_snr(jnp.ravel(t)[0])
        return jax.lax.cond((low <= log_snr) & (log_snr <= high), guided, plain, x, t)

    return denoise
