"""Approach 1 of Hoffmann et al. (2022): the best run at each FLOP count during training."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from genai_jax.config import ConfigError
from genai_jax.scaling.fits.bootstrap import RESAMPLES, resampled
from genai_jax.scaling.fits.points import Curve
from genai_jax.scaling.fits.power_law import PowerLaw, fit_line

BUDGETS = 1500  # number of FLOP counts at which runs are compared, as in the paper


class Envelope(NamedTuple):
    """The best run at each budget, and power laws in the budget fitted to them.

    A run in the middle of its learning-rate schedule is worse than one whose schedule ends there,
    so if all runs have the same schedule, this approach favors small models.
    """

    budget: np.ndarray  # [budgets] where the best run is neither the smallest nor the largest
    parameters: np.ndarray  # [budgets] size of the best run
    tokens: np.ndarray  # [budgets] tokens that the best run has seen
    loss: np.ndarray  # [budgets] loss of the best run
    parameters_law: PowerLaw
    tokens_law: PowerLaw
    edges: tuple[float, float]  # shares of all budgets that two runs reach: smallest, largest best


def fit_envelope(curves: list[Curve], *, resamples: int = RESAMPLES, seed: int = 0) -> Envelope:
    """Compares runs at `BUDGETS` counts between the smallest and largest FLOPs of all curves.

    A count at which the best run is the smallest or the largest of those that reach it is left out,
    because an even smaller or larger one might be better. The bootstrap resamples runs.

    Raises:
      ConfigError: the best run has the same size everywhere.
    """
    curves = sorted(curves, key=lambda curve: curve.parameters)
    sizes = np.array([curve.parameters for curve in curves])
    ends = [curve.flops[[0, -1]] for curve in curves]
    budget = np.geomspace(np.min(ends), np.max(ends), BUDGETS)
    loss = np.stack([_along(budget, curve, curve.loss) for curve in curves])  # [runs, budgets]
    tokens = np.stack([_along(budget, curve, curve.tokens) for curve in curves])
    best, inside = _best(loss, sizes)
    if len(np.unique(sizes[best[inside]])) < 2:
        raise ConfigError(
            f"the envelope of {len(curves)} training curves needs at least 2 sizes that are best "
            "at some FLOP count without being the smallest or largest there, but there are "
            f"{len(np.unique(sizes[best[inside]]))}"
        )
    at = np.flatnonzero(inside)
    best_runs = sizes[best[at]], tokens[best[at], at], loss[best[at], at]
    lines = _resampled_lines(budget, loss, tokens, sizes, resamples, seed)
    span = budget[at[0]], budget[at[-1]]
    laws = [
        PowerLaw(*map(float, fit_line(budget[at], y)), samples, span)
        for y, samples in zip(best_runs[:2], lines, strict=True)
    ]
    return Envelope(budget[at], *best_runs, *laws, _edges(loss, sizes))


def _edges(loss: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """Shares of the budgets where the smallest, or largest, of several sizes is the best."""
    there = np.isfinite(loss)
    best = sizes[np.argmin(np.where(there, loss, np.inf), 0)]
    smallest = np.min(np.where(there, sizes[:, None], np.inf), 0)
    largest = np.max(np.where(there, sizes[:, None], -np.inf), 0)
    several = smallest < largest
    count = max(int(several.sum()), 1)
    shares = ((best == end) & several for end in (smallest, largest))
    return tuple(float(share.sum() / count) for share in shares)


def _along(budget: np.ndarray, curve: Curve, values: np.ndarray) -> np.ndarray:
    """`values` [steps] of a curve, interpolated at FLOPs [budgets]; NaN outside the curve."""
    logs = np.interp(np.log(budget), np.log(curve.flops), np.log(values), left=np.nan, right=np.nan)
    return np.exp(logs)


def _best(loss: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """([budgets] best run, [budgets] whether others are smaller and larger); sizes increase."""
    there = np.isfinite(loss)
    best = np.argmin(np.where(there, loss, np.inf), 0)
    smallest = np.min(np.where(there, sizes[:, None], np.inf), 0)
    largest = np.max(np.where(there, sizes[:, None], -np.inf), 0)
    return best, (sizes[best] > smallest) & (sizes[best] < largest)


def _resampled_lines(budget, loss, tokens, sizes, resamples: int, seed: int) -> np.ndarray:
    """[2, resamples, 2]: lines of parameters and tokens; NaN for a resample without a line."""
    lines = np.full((2, resamples, 2), np.nan)
    for i, counts in enumerate(resampled(len(sizes), resamples, seed, min(4, len(sizes)))):
        runs = np.flatnonzero(counts)
        best, inside = _best(loss[runs], sizes[runs])
        at = np.flatnonzero(inside)
        if len(at):
            run = runs[best[at]]
            lines[0, i] = fit_line(budget[at], sizes[run])
            lines[1, i] = fit_line(budget[at], tokens[run, at])
    return lines
