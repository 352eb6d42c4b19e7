"""Exponential integrators that remember: DPM-Solver++ 2M and 3M, and UniPC.

With lambda = log(alpha / sigma), the exact solution of the probability-flow ODE over a step of
length h in lambda is (Lu et al. 2022, DPM-Solver++, equation 8)

  x_next = (sigma_next / sigma) x + alpha_next int_0^h exp(u - h) x0_hat(lambda + u) du.

The methods differ in the polynomial that stands for x0_hat: through the newest estimates (2M, 3M),
and once more through the estimate at the end of the step (UniPC's corrector; Zhao et al. 2023).
Where log-SNR is infinite at one end of a step no polynomial in lambda exists; there x0_hat is held
constant, which is exact in the limit.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from genai_jax.diffusion.schedule import Schedule
from genai_jax.diffusion.steps import half_log_snr_steps, intervals

# Of a step over the one before it: beyond, extrapolation does more harm than good.
MOST_GROWTH = 3.0


class Weights(NamedTuple):
    """x_next = ratio x + sum of newest[i] x0_hat[i], newest first; each [steps]."""

    t: jax.Array
    ratio: jax.Array
    newest: tuple[jax.Array, ...]


def _moments(h, alpha_next, constant):
    """alpha_next int_0^h exp(u - h) u^k du for k = 0, 1, 2; `constant` is that for k = 0."""
    first = alpha_next * h - constant
    return constant, first, alpha_next * jnp.square(h) - 2 * first


def _base(schedule: Schedule, times: jax.Array):
    """(step, ratio, constant, h) of all steps."""
    step = intervals(schedule, times)
    ratio = step.sigma_next / step.sigma
    constant = step.alpha_next - step.alpha * ratio  # alpha_next (1 - exp(-h)), finite at the ends
    return step, ratio, constant, half_log_snr_steps(schedule, times)


def _before(x: jax.Array, count: int = 1) -> jax.Array:
    """The values of `count` steps ago; infinite where there are none."""
    return jnp.concatenate([jnp.full(count, jnp.inf, x.dtype), x[: x.shape[0] - count]])


def _or_lower(weights: tuple, lower: tuple) -> tuple:
    """`weights` where all of them are finite, else those of a lower order."""
    finite = jnp.all(jnp.stack([jnp.isfinite(w) for w in weights]), 0)
    lower = (*lower, *(jnp.zeros_like(lower[0]) for _ in weights[len(lower) :]))
    return tuple(jnp.where(finite, w, low) for w, low in zip(weights, lower, strict=True))


def _linear(h, h_before, constant, first):
    """Weights of a line through the two newest estimates."""
    slope = first / h_before
    known = jnp.isfinite(h_before) & jnp.isfinite(h) & (h / h_before < MOST_GROWTH)
    return _or_lower(
        (jnp.where(known, constant + slope, jnp.nan), jnp.where(known, -slope, jnp.nan)),
        (constant,),
    )


def prepare_2m(schedule, times):
    """Lu et al. 2022, algorithm 2: int exp(u - h) u du is taken as h / 2 int exp(u - h) du."""
    step, ratio, constant, h = _base(schedule, times)
    return Weights(step.t, ratio, _linear(h, _before(h), constant, constant * h / 2))


def begin_2m(x):
    return x, jnp.zeros_like(x)


def advance_2m(denoise, carry, weights: Weights, key):
    del key
    x, before = carry
    x0 = denoise(x, weights.t)
    return weights.ratio * x + weights.newest[0] * x0 + weights.newest[1] * before, x0


# 3M needs a first step of second order, or the whole is of second order: the first step is taken
# again, through the estimate at its end.


def prepare_3m(schedule, times):
    """A parabola through the three newest estimates, integrated exactly.

    The coefficients begin with an extra entry: the first step as a predictor; the second entry
    takes it again from the same x.
    """
    step, ratio, constant, h = _base(schedule, times)
    h1, h2 = _before(h), _before(h, 2)
    _, first, second = _moments(h, step.alpha_next, constant)
    bend = (second + h1 * first) / (h1 + h2)
    parabola = (constant + first / h1 + bend / h1, -first / h1 - bend / h1 - bend / h2, bend / h2)
    usable = jnp.isfinite(h) & jnp.isfinite(h1) & jnp.isfinite(h2)
    usable &= (h / h1 < MOST_GROWTH) & (h1 / h2 < MOST_GROWTH)
    parabola = tuple(jnp.where(usable, w, jnp.nan) for w in parabola)
    newest = _or_lower(parabola, _linear(h, h1, constant, first))
    twice = lambda x: jnp.concatenate([x[:1], x])
    weights = Weights(twice(step.t), twice(ratio), tuple(twice(w) for w in newest))
    # Entry 1: from x at times[0], with the estimates at times[1] and times[0] as end and begin.
    end = first[0] / h[0]
    again = jnp.stack([end, constant[0] - end])
    again = jnp.where(jnp.isfinite(again), again, jnp.stack([0 * end, constant[0]]))
    again = jnp.where(jnp.isfinite(h[0]), again, jnp.stack([jnp.zeros_like(end), constant[0]]))
    newest = tuple(w.at[1].set(again[i] if i < 2 else 0.0) for i, w in enumerate(weights.newest))
    t = weights.t.at[1].set(step.t_next[0])
    repeats = jnp.zeros(t.shape[0], bool).at[1].set(True)
    return Weights(t, weights.ratio, newest), repeats


def begin_3m(x):
    zero = jnp.zeros_like(x)
    return x, x, zero, zero


def advance_3m(denoise, carry, coefficients, key):
    del key
    weights, repeats = coefficients
    x, x_before, newer, older = carry
    x0 = denoise(x, weights.t)
    base = jnp.where(repeats, x_before, x)
    a, b, c = weights.newest
    # The estimate of the predicted end serves its step alone: it is made anew after it.
    history = jnp.where(repeats, newer, x0), jnp.where(repeats, older, newer)
    return weights.ratio * base + a * x0 + b * newer + c * older, base, *history


class UniPc(NamedTuple):
    """Corrector weights of the step behind, predictor weights of the step ahead."""

    t: jax.Array
    correct: tuple[jax.Array, ...]  # ratio, then estimates: end, begin, before
    predict: tuple[jax.Array, ...]  # ratio, then estimates: begin, before


def prepare_unipc(schedule, times):
    """UniPC of order 2: a line ahead, a parabola through its end behind; third order together.

    The linear systems of Zhao et al. 2023 (equation 5) are solved exactly, which makes their choice
    of B(h) cancel.
    """
    step, ratio, constant, h = _base(schedule, times)
    before = _before(h)
    _, first, second = _moments(h, step.alpha_next, constant)
    predict = (ratio, *_linear(h, before, constant, first))
    bend = (second - h * first) / (h + before)  # of u (u - h), divided by the outer distance
    line = _or_lower((first / h, constant - first / h), (jnp.zeros_like(h), constant))
    line = tuple(
        jnp.where(jnp.isfinite(h), w, low)
        for w, low in zip(line, (jnp.zeros_like(h), constant), strict=True)
    )
    parabola = (
        first / h + bend / h,
        constant - first / h - bend / h - bend / before,
        bend / before,
    )
    usable = jnp.isfinite(h) & jnp.isfinite(before) & (h / before < MOST_GROWTH)
    parabola = tuple(jnp.where(usable, w, jnp.nan) for w in parabola)
    corrector = (ratio, *_or_lower(parabola, line))
    # The corrector of a step runs at the beginning of the next one; the first has none behind it.
    keep = (0.0, 0.0, 0.0, 0.0)
    shifted = tuple(
        jnp.concatenate([jnp.full(1, k, w.dtype), w[:-1]])
        for k, w in zip(keep, corrector, strict=True)
    )
    is_first = jnp.arange(h.shape[0]) == 0
    return UniPc(step.t, shifted, predict), is_first


def begin_unipc(x):
    zero = jnp.zeros_like(x)
    return x, zero, zero, zero


def advance_unipc(denoise, carry, coefficients, key):
    del key
    weights, is_first = coefficients
    x, x_behind, behind, before = carry  # x is a prediction until its estimate has corrected it
    x0 = denoise(x, weights.t)
    ratio, a, b, c = weights.correct
    x = jnp.where(is_first, x, ratio * x_behind + a * x0 + b * behind + c * before)
    ratio, a, b = weights.predict
    return ratio * x + a * x0 + b * behind, x, x0, behind
