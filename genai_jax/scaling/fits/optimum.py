"""The compute-optimal size and number of tokens for a budget, by a fitted law."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from genai_jax.config import ConfigError
from genai_jax.scaling.fits.bootstrap import interval
from genai_jax.scaling.fits.fit import Fit
from genai_jax.scaling.fits.points import Points

ROUNDING = 1e-3  # of a budget: parameters and tokens of a run are whole numbers


class Cost(NamedTuple):
    """FLOPs of a training run, C = factor N^power D; factor 6 and power 1 give C = 6 N D."""

    factor: float
    power: float
    error: float  # largest relative deviation of a run


def fit_cost(points: Points) -> Cost:
    """Fits the training cost of the runs.

    Output heads and attention make small models more expensive than 6 N D.

    Raises:
      ConfigError: all runs have the same size.
    """
    x, y = np.log(points.parameters), np.log(points.flops / points.tokens)
    if np.ptp(x) == 0:
        raise ConfigError(
            f"the cost of a run needs at least 2 different sizes, but all runs have "
            f"{points.parameters[0]:g} parameters"
        )
    power, log_factor = np.polyfit(x - x.mean(), y, 1)
    error = np.max(np.abs(np.expm1(y - log_factor - power * (x - x.mean()))))
    return Cost(float(np.exp(log_factor - power * x.mean())), float(power), float(error))


class Estimate(NamedTuple):
    """A value with its interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value, samples: np.ndarray) -> Estimate:
        """From a value and its resamples [resamples]; NaNs are left out."""
        usable = samples[np.isfinite(samples)]
        if not len(usable):
            return cls(float(value), float("nan"), float("nan"))
        return cls(float(value), *map(float, interval(usable)))


class Optimum(NamedTuple):
    """The compute-optimal run for a budget."""

    budget: float  # FLOPs
    parameters: Estimate
    tokens: Estimate
    loss: Estimate | None


def optimum(fit: Fit, cost: Cost, budget: float) -> Optimum:
    """Minimizes the loss of the parametric law for a budget, in closed form.

    With C = k N^g D, A / N^alpha + B / D^beta is smallest at N^(alpha + g beta) =
    alpha A / (g beta B) (C / k)^beta; k = 6 and g = 1 give Hoffmann et al. 2022, equation 4.

    Raises:
      ConfigError: the loss does not fall with both N and D, so the law has no optimum.
    """
    *_, alpha, beta = fit.law.values(fit.x)
    if alpha <= 0 or beta <= 0 or cost.power <= 0:
        raise ConfigError(
            f"the fitted law has no compute-optimal size: alpha is {alpha:.3g}, beta {beta:.3g}, "
            f"and FLOPs per token grow as N^{cost.power:.3g}; all three must be positive"
        )
    parameters, tokens, loss = _best_sizes(fit.law.values(fit.x)[None], cost, budget)[:, 0]
    samples = _best_sizes(fit.law.values(fit.samples), cost, budget)
    values = (parameters, tokens, loss)
    return Optimum(budget, *(Estimate.of(*pair) for pair in zip(values, samples, strict=True)))


def _best_sizes(values: np.ndarray, cost: Cost, budget: float) -> np.ndarray:
    """[3, resamples]: optimal parameters, tokens and loss, NaN if there is no optimum.

    `values` are coefficients [resamples, 5].
    """
    e, a, b, alpha, beta = values.T
    k, g, _ = cost
    with np.errstate(all="ignore"):
        log_n = np.log(alpha * a / (g * beta * b)) + beta * np.log(budget / k)
        log_n = np.where((alpha > 0) & (beta > 0), log_n / (alpha + g * beta), np.nan)
        log_d = np.log(budget / k) - g * log_n
        loss = e + np.exp(np.log(a) - alpha * log_n) + np.exp(np.log(b) - beta * log_d)
        return np.stack([np.exp(log_n), np.exp(log_d), loss])


def check_budget(
    budget: float, points: Points, extrapolate: float = 1.0, flag="budget", allows="extrapolate"
):
    """Raises `ConfigError` for a budget outside the runs' range by more than `extrapolate`.

    The message names the `flag` with the budget, and the flag that `allows` a larger factor.
    """
    check_range(flag, budget, points.flops, "FLOPs", extrapolate, allows=allows)


def check_optimum(best: Optimum, points: Points, extrapolate: float = 1.0):
    """Raises `ConfigError` if the best size or tokens are outside the runs' range like that."""
    for name in ("parameters", "tokens"):
        what = f"budget={best.budget:g}, whose best run has {best.parameters.value:.3g} parameters "
        what += f"and {best.tokens.value:.3g} tokens,"
        value = getattr(best, name).value
        check_range(what, value, getattr(points, name), name, extrapolate, say_value=False)


def check_range(what, value, data: np.ndarray, unit: str, extrapolate: float, say_value=True,
                allows="extrapolate"):  # fmt: skip
    """Raises `ConfigError` for a value beyond the range of data [points] by more than a factor."""
    low, high = data.min(), data.max()
    if low / extrapolate * (1 - ROUNDING) <= value <= high * extrapolate * (1 + ROUNDING):
        return
    factor = max(low / value, value / high)
    rounded = float(f"{factor:.3g}")
    needed = rounded if factor <= rounded * (1 + ROUNDING) else np.ceil(10 * factor) / 10
    subject = f"{what}={value:g}" if say_value else what
    raise ConfigError(
        f"--{subject} is outside the fitted range, {low:.3g} to {high:.3g} {unit}; "
        f"--{allows}={needed:g} would allow it"
    )
