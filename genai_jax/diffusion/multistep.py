"""Multistep exponential integrators: DPM-Solver++ 2M and 3M, and UniPC.

With lambda = log(alpha / sigma), the exact solution of the probability-flow ODE over a step of
length h in lambda is (Lu et al. 2022, DPM-Solver++, equation 8)

  x_next = (sigma_next / sigma) x + alpha_next int_0^h exp(u - h) x0_hat(lambda + u) du.

The methods differ in the polynomial that approximates x0_hat: through the newest estimates (2M,
3M), and once more through the estimate at the end of the step (UniPC's corrector; Zhao et al.
2023). If the log-SNR is infinite at one end of a step, no polynomial in lambda exists; there x0_hat
is held constant, which is exact in the limit.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from genai_jax.diffusion.schedule import Schedule
from genai_jax.diffusion.steps import half_log_snr_steps, intervals

# Largest ratio of a step to the one before it: beyond it, extrapolation does more harm than good.
MAX_GROWTH = 3.0


class Weights(NamedTuple):
    """x_next = ratio x + sum of newest[i] x0_hat[i], newest first; each [steps]."""

    t: jax.Array
    ratio: jax.Array
    newest: tuple[jax.Array, ...]


def _moments(h, alpha_next, constant):
    """alpha_next int_0^h exp(u - h) u^k du for k = 0, 1, 2; `constant` is the one for k = 0."""
    first = alpha_next * h - constant
    return constant, first, alpha_next * jnp.square(h) - 2 * first


def _base(schedule: Schedule, times: jax.Array):
    """(step, ratio, constant, h) for all steps, each [steps]."""
    step = intervals(schedule, times)
    ratio = step.sigma_next / step.sigma
    constant = step.alpha_next - step.alpha * ratio  # alpha_next (1 - exp(-h)), finite at the ends
    return step, ratio, constant, half_log_snr_steps(schedule, times)


def _previous(x: jax.Array, count: int = 1) -> jax.Array:
    """The values `count` steps earlier; infinite where there are none."""
    return jnp.concatenate([jnp.full(count, jnp.inf, x.dtype), x[: x.shape[0] - count]])


def _or_lower(weights: tuple, lower: tuple) -> tuple:
    """`weights` where all of them are finite, `lower`, of a lower order, elsewhere."""
    finite = jnp.all(jnp.stack([jnp.isfinite(w) for w in weights]), 0)
    lower = (*lower, *(jnp.zeros_like(lower[0]) for _ in weights[len(lower) :]))
    return tuple(jnp.where(finite, w, low) for w, low in zip(weights, lower, strict=True))


def _linear(h, h_previous, constant, first):
    """Weights of a line through the two newest estimates."""
    slope = first / h_previous
    usable = jnp.isfinite(h_previous) & jnp.isfinite(h) & (h / h_previous < MAX_GROWTH)
    return _or_lower(
        (jnp.where(usable, constant + slope, jnp.nan), jnp.where(usable, -slope, jnp.nan)),
        (constant,),
    )


def prepare_2m(schedule, times):
    """Lu et al. 2022, algorithm 2: approximates int exp(u - h) u du by h / 2 int exp(u - h) du."""
    step, ratio, constant, h = _base(schedule, times)
    return Weights(step.t, ratio, _linear(h, _previous(h), constant, constant * h / 2))


def begin_2m(x):
    return x, jnp.zeros_like(x)


def advance_2m(denoise, carry, weights: Weights, key):
    del key
    x, previous = carry
    x0 = denoise(x, weights.t)
    return weights.ratio * x + weights.newest[0] * x0 + weights.newest[1] * previous, x0


# 3M is of third order only if its first step is of second order, so the first step is taken twice,
# the second time with the estimate at its end.


def prepare_3m(schedule, times):
    """A parabola through the three newest estimates, integrated exactly.

    The coefficients begin with an extra entry, which predicts the end of the first step; the second
    entry repeats the step from the same x.
    """
    step, ratio, constant, h = _base(schedule, times)
    h1, h2 = _previous(h), _previous(h, 2)
    _, first, second = _moments(h, step.alpha_next, constant)
    curve = (second + h1 * first) / (h1 + h2)
    parabola = (
        constant + first / h1 + curve / h1,
        -first / h1 - curve / h1 - curve / h2,
        curve / h2,
    )
    usable = jnp.isfinite(h) & jnp.isfinite(h1) & jnp.isfinite(h2)
    usable &= (h / h1 < MAX_GROWTH) & (h1 / h2 < MAX_GROWTH)
    parabola = tuple(jnp.where(usable, w, jnp.nan) for w in parabola)
    newest = _or_lower(parabola, _linear(h, h1, constant, first))
    twice = lambda x: jnp.concatenate([x[:1], x])
    weights = Weights(twice(step.t), twice(ratio), tuple(twice(w) for w in newest))
    # Entry 1: from x at times[0], with the estimates at the step's end times[1] and start times[0].
    end = first[0] / h[0]
    repeat = jnp.stack([end, constant[0] - end])
    repeat = jnp.where(jnp.isfinite(repeat), repeat, jnp.stack([0 * end, constant[0]]))
    repeat = jnp.where(jnp.isfinite(h[0]), repeat, jnp.stack([jnp.zeros_like(end), constant[0]]))
    newest = tuple(w.at[1].set(repeat[i] if i < 2 else 0.0) for i, w in enumerate(weights.newest))
    t = weights.t.at[1].set(step.t_next[0])
    repeats = jnp.zeros(t.shape[0], bool).at[1].set(True)
    return Weights(t, weights.ratio, newest), repeats


def begin_3m(x):
    zero = jnp.zeros_like(x)
    return x, x, zero, zero


def advance_3m(denoise, carry, coefficients, key):
    del key
    weights, repeats = coefficients
    x, x_previous, newer, older = carry
    x0 = denoise(x, weights.t)
    base = jnp.where(repeats, x_previous, x)
    a, b, c = weights.newest
    # The estimate at the predicted end is used only for its step: it is computed again after it.
    history = jnp.where(repeats, newer, x0), jnp.where(repeats, older, newer)
    return weights.ratio * base + a * x0 + b * newer + c * older, base, *history


class UniPc(NamedTuple):
    """Corrector weights of the previous step, predictor weights of the next one."""

    t: jax.Array
    correct: tuple[jax.Array, ...]  # ratio, then the estimates: end, start, previous
    predict: tuple[jax.Array, ...]  # ratio, then the estimates: start, previous


def prepare_unipc(schedule, times):
    """UniPC-2: predicts with a line, corrects with a parabola through the step's end.

    Together they are of third order. The linear systems of Zhao et al. 2023 (equation 5) are solved
    exactly, so that their choice of B(h) cancels.
    """
    step, ratio, constant, h = _base(schedule, times)
    h_previous = _previous(h)
    _, first, second = _moments(h, step.alpha_next, constant)
    predict = (ratio, *_linear(h, h_previous, constant, first))
    curve = (second - h * first) / (h + h_previous)  # integral of u (u - h) / (h + h_previous)
    line = _or_lower((first / h, constant - first / h), (jnp.zeros_like(h), constant))
    line = tuple(
        jnp.where(jnp.isfinite(h), w, low)
        for w, low in zip(line, (jnp.zeros_like(h), constant), strict=True)
    )
    parabola = (
        first / h + curve / h,
        constant - first / h - curve / h - curve / h_previous,
        curve / h_previous,
    )
    usable = jnp.isfinite(h) & jnp.isfinite(h_previous) & (h / h_previous < MAX_GROWTH)
    parabola = tuple(jnp.where(usable, w, jnp.nan) for w in parabola)
    corrector = (ratio, *_or_lower(parabola, line))
    # The corrector of a step runs at the start of the next one; before the first there is none.
    shifted = tuple(jnp.concatenate([jnp.zeros(1, w.dtype), w[:-1]]) for w in corrector)
    is_first = jnp.arange(h.shape[0]) == 0
    return UniPc(step.t, shifted, predict), is_first


def begin_unipc(x):
    zero = jnp.zeros_like(x)
    return x, zero, zero, zero


def advance_unipc(denoise, carry, coefficients, key):
    del key
    weights, is_first = coefficients
    # x is a prediction, which the estimate at x corrects; newer and older are earlier estimates.
    x, x_previous, newer, older = carry
    x0 = denoise(x, weights.t)
    ratio, a, b, c = weights.correct
    x = jnp.where(is_first, x, ratio * x_previous + a * x0 + b * newer + c * older)
    ratio, a, b = weights.predict
    return ratio * x + a * x0 + b * newer, x, x0, newer
