"""Approach 2 of Hoffmann et al. (2022): the best size for a budget is the minimum of a parabola."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from genai_jax.config import ConfigError
from genai_jax.scaling.edges import LARGEST, SMALLEST
from genai_jax.scaling.fits.bootstrap import RESAMPLES, resampled
from genai_jax.scaling.fits.points import Points
from genai_jax.scaling.fits.power_law import PowerLaw, fit_line

SAME_BUDGET = 1.1  # runs whose FLOPs differ by at most this factor share a budget


class Valley(NamedTuple):
    """The runs of one budget and a parabola loss = c0 + c1 x + c2 x^2, x = log N, fitted to them.

    Attributes:
      budget: geometric mean of the runs' FLOPs.
      runs: indices of the runs.
      parabola: [3] (c0, c1, c2).
      parameters, tokens, loss: values at the minimum.
      inside: whether the parabola has a minimum that lies between the sizes of the runs.
      edge: otherwise the end of these sizes where the parabola is lowest, as `edges.edge` says it.
    """

    budget: float
    runs: np.ndarray
    parabola: np.ndarray
    parameters: float
    tokens: float
    loss: float
    inside: bool
    edge: str


class IsoFlop(NamedTuple):
    """Best sizes, and power laws in the budget fitted to the minima that are inside."""

    valleys: list[Valley]
    parameters: PowerLaw
    tokens: PowerLaw
    loss: PowerLaw


def budgets(flops: np.ndarray) -> list[np.ndarray]:
    """Indices of the runs of each budget, in order of increasing budget."""
    groups: list[list[int]] = []
    for index in np.argsort(flops):
        if groups and flops[index] <= SAME_BUDGET * flops[groups[-1][0]]:
            groups[-1].append(int(index))
        else:
            groups.append([int(index)])
    return [np.array(group) for group in groups]


def fit_isoflop(points: Points, *, resamples: int = RESAMPLES, seed: int = 0) -> IsoFlop:
    """Fits parabolas, and power laws to their minima.

    The bootstrap resamples within each budget, keeping at least four different sizes if there are
    that many: a parabola goes through any three.

    Raises:
      ConfigError: fewer than two budgets with three sizes and a minimum that is inside.
    """
    valleys = valleys_of(points)
    inside = [valley for valley in valleys if valley.inside]
    if len(inside) < 2:
        raise ConfigError(
            "an isoFLOP fit needs 2 budgets with 3 sizes each and a minimum between them, but "
            f"there are {len(inside)} (of {len(valleys)} budgets with 3 sizes)"
        )
    resampled_minima = [
        _resampled_minima(points, valley, resamples, seed + i) for i, valley in enumerate(inside)
    ]
    samples = np.stack(resampled_minima, -1)  # [3, resamples, budgets]
    minima = np.array([(v.parameters, v.tokens, v.loss) for v in inside]).T
    budget = np.array([valley.budget for valley in inside])
    laws = [_law(budget, *pair) for pair in zip(minima, samples, strict=True)]
    return IsoFlop(valleys, *laws)


def valleys_of(points: Points) -> list[Valley]:
    """A parabola for each budget that has three sizes, in order of increasing budget."""
    groups = [g for g in budgets(points.flops) if len(np.unique(points.parameters[g])) >= 3]
    return [_valley(points, group) for group in groups]


def _valley(points: Points, runs: np.ndarray) -> Valley:
    here = points.where(runs)
    weights = np.ones((1, len(runs)))
    parabola, center = _parabolas(here, weights)
    minimum = _minima(here, weights, parabola, center)[:, 0]
    x = np.log(here.parameters)
    inside = bool(parabola[0, 2] > 0 and x.min() < np.log(minimum[0]) < x.max())
    c0, c1, c2 = parabola[0]  # in x - center
    low, high = (np.polyval((c2, c1, c0), end - center) for end in (x.min(), x.max()))
    end = "" if inside else SMALLEST if low < high else LARGEST
    plain = np.array([c0 - c1 * center + c2 * center**2, c1 - 2 * c2 * center, c2])
    budget = float(np.exp(np.mean(np.log(here.flops))))
    return Valley(budget, runs, plain, *map(float, minimum), inside, end)


def _resampled_minima(points: Points, valley: Valley, resamples: int, seed: int) -> np.ndarray:
    """[3, resamples]: parameters, tokens and loss; NaN if the minimum is not among the runs."""
    here = points.where(valley.runs)
    sizes = here.parameters
    counts = resampled(len(sizes), resamples, seed, min(4, len(np.unique(sizes))), sizes)
    parabola, center = _parabolas(here, counts)
    minima = _minima(here, counts, parabola, center)
    smallest, largest = here.parameters.min(), here.parameters.max()
    good = (parabola[:, 2] > 0) & (minima[0] > smallest) & (minima[0] < largest)
    return np.where(good, minima, np.nan)


def _parabolas(here: Points, weights) -> tuple[np.ndarray, float]:
    """([resamples, 3], center): weighted least squares of loss on x - center, where x = log N."""
    x = np.log(here.parameters)
    center = float(np.mean(x))
    return _weighted_polynomials(x - center, here.loss, weights, 2), center


def _minima(here: Points, weights, parabola, center: float) -> np.ndarray:
    """[3, resamples]: parameters, tokens and loss at the extrema of the parabolas.

    The tokens come from a line fitted to log D over log N: within a budget, larger models see
    fewer tokens.
    """
    c0, c1, c2 = parabola.T
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        x = -c1 / (2 * c2)
        log_n = np.log(here.parameters) - center
        d0, d1 = _weighted_polynomials(log_n, np.log(here.tokens), weights, 1).T
        return np.stack([np.exp(center + x), np.exp(d0 + d1 * x), c0 + c1 * x / 2])


def _weighted_polynomials(x, y, weights, degree: int) -> np.ndarray:
    """Coefficients [resamples, degree + 1] of least-squares polynomials, constant term first.

    x and y are [points], weights are [resamples, points].
    """
    root = np.sqrt(weights)[..., None]
    powers = x[:, None] ** np.arange(degree + 1)
    return (np.linalg.pinv(root * powers) @ (root * y[:, None]))[..., 0]


def _law(budget: np.ndarray, y: np.ndarray, samples: np.ndarray) -> PowerLaw:
    """The power law fitted to y [budgets]; NaNs in samples [resamples, budgets] get weight 0."""
    log_scale, power = fit_line(budget, y)
    usable = np.isfinite(samples)
    filled = np.where(usable, samples, 1.0)
    lines = fit_line(np.broadcast_to(budget, filled.shape), filled, usable.astype(float))
    return PowerLaw(float(log_scale), float(power), lines, (budget.min(), budget.max()))
