"""The best size and number of tokens for a budget, by a fitted law."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from genai_jax.config import ConfigError
from genai_jax.scaling.fits.bootstrap import interval
from genai_jax.scaling.fits.fit import Fit
from genai_jax.scaling.fits.points import Points


class Cost(NamedTuple):
    """FLOPs of a training run: C = factor N^power D; 6 and 1 for C = 6 N D."""

    factor: float
    power: float
    error: float  # largest relative deviation of a run from it


def fit_cost(points: Points) -> Cost:
    """What training costs, as the runs say.

    Heads and attention make small models dearer than 6 N D.

    Raises:
      ConfigError: all runs have one size.
    """
    x, y = np.log(points.parameters), np.log(points.flops / points.tokens)
    if np.ptp(x) == 0:
        raise ConfigError(f"all runs have {points.parameters[0]:g} parameters")
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
        """Of a value and its resamples [resamples]; those that are nan are left out."""
        usable = samples[np.isfinite(samples)]
        if not len(usable):
            return cls(float(value), float("nan"), float("nan"))
        return cls(float(value), *map(float, interval(usable)))


class Optimum(NamedTuple):
    """The compute-optimal run of a budget."""

    budget: float  # FLOPs
    parameters: Estimate
    tokens: Estimate
    loss: Estimate | None


def optimum(fit: Fit, cost: Cost, budget: float) -> Optimum:
    """The least loss of the parametric law that a budget buys, in closed form.

    With C = k N^g D, A / N^alpha + B / D^beta is least at N^(alpha + g beta) =
    alpha A / (g beta B) (C / k)^beta; k = 6 and g = 1 give Hoffmann et al. 2022, equation 4.

    Raises:
      ConfigError: a law whose loss does not fall with both N and D has no optimum.
    """
    *_, alpha, beta = fit.law.values(fit.x)
    if alpha <= 0 or beta <= 0 or cost.power <= 0:
        raise ConfigError(
            f"the fitted law has no compute-optimal size: alpha is {alpha:.3g}, beta {beta:.3g}, "
            f"and FLOPs a token grow as N^{cost.power:.3g}; each must be positive"
        )
    parameters, tokens, loss = _best_sizes(fit.law.values(fit.x)[None], cost, budget)[:, 0]
    samples = _best_sizes(fit.law.values(fit.samples), cost, budget)
    found = (Estimate.of(*pair) for pair in zip((parameters, tokens, loss), samples, strict=True))
    return Optimum(budget, *found)


def _best_sizes(values: np.ndarray, cost: Cost, budget: float) -> np.ndarray:
    """[3, resamples]: parameters, tokens, loss, for coefficients [resamples, 5]; nan if none."""
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
    """Raises `ConfigError` for a budget further from the runs' than `extrapolate` times.

    The message says which flag asks for it and which one allows it.
    """
    check_range(flag, budget, points.flops, "FLOPs", extrapolate, allows=allows)


def check_optimum(best: Optimum, points: Points, extrapolate: float = 1.0):
    """Raises `ConfigError` where the best size or tokens are that far from those of the runs."""
    for name in ("parameters", "tokens"):
        what = f"budget={best.budget:g}, whose best run has {best.parameters.value:.3g} parameters "
        what += f"and {best.tokens.value:.3g} tokens,"
        value = getattr(best, name).value
        check_range(what, value, getattr(points, name), name, extrapolate, say_value=False)


def check_range(what, value, data: np.ndarray, unit: str, extrapolate: float, say_value=True,
                allows="extrapolate"):  # fmt: skip
    """Raises `ConfigError` for a value outside of data [points] by more than a factor."""
    low, high = data.min(), data.max()
    if low / extrapolate * (1 - 1e-9) <= value <= high * extrapolate * (1 + 1e-9):
        return
    factor = max(low / value, value / high)
    said = f"{what}={value:g}" if say_value else what
    raise ConfigError(
        f"--{said} is outside of what was fitted, {low:.3g} to {high:.3g} {unit}; "
        f"--{allows}={np.ceil(10 * factor * (1 - 1e-9)) / 10:g} would accept it"
    )
