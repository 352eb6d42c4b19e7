"""Fits all scaling laws to a set of runs and returns the sections of a report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from genai_jax.config import ConfigError
from genai_jax.scaling.fits import sections
from genai_jax.scaling.fits.all_laws import Fits, fit_all
from genai_jax.scaling.fits.bootstrap import RESAMPLES
from genai_jax.scaling.fits.isoflop import budgets as groups_of
from genai_jax.scaling.fits.optimum import Optimum, check_budget, check_optimum, optimum
from genai_jax.scaling.fits.points import Curve, Points
from genai_jax.scaling.report_types import Section


class Analysis(NamedTuple):
    """The laws fitted to runs, and the sections of a report about them."""

    fits: Fits
    sections: list[Section]


def analyzed(
    points: Points,
    *,
    held_out: np.ndarray | None = None,
    curves: list[Curve] | None = None,
    budgets: Sequence[float] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    extrapolate: float = 1.0,
    loss_unit: str = "nats per token",
) -> Analysis:
    """Fits every law to the runs that are not held out, and predicts those that are.

    Args:
      points: all runs.
      held_out: [points] bool, runs to predict instead of fitting.
      curves: training curves of the runs that are not held out, for the envelope.
      budgets: FLOPs to find the optimal size and tokens for; those of the runs if not given.
      seed: random seed for the bootstrap.
      resamples: number of bootstrap resamples; 0 omits the intervals.
      extrapolate: largest factor by which a budget, and its optimal size and tokens, may lie
        outside the range of the fitted runs.
      loss_unit: unit of the loss, for axis labels and table headers.

    Raises:
      ConfigError: fewer runs than coefficients, or a budget too far outside the runs' range.
    """
    held_out = np.zeros(len(points.loss), bool) if held_out is None else np.asarray(held_out, bool)
    fitted = points.where(~held_out)
    for budget in budgets or ():
        check_budget(budget, fitted, extrapolate)
    fits = fit_all(fitted, curves, seed, resamples)
    hidden = points.where(held_out)
    optima, left_out = _optima(fits, budgets, extrapolate)
    parts = [
        sections.joint(fits, hidden, loss_unit),
        sections.single(fits, loss_unit),
        sections.isoflop(fits, loss_unit),
        sections.envelope(fits, curves, loss_unit),
        sections.optimum(fits, optima, left_out, extrapolate),
    ]
    if held_out.any():
        parts.append(sections.held_out(fits, hidden, loss_unit))
    return Analysis(fits, parts)


def scaling_law(points: Points, **options: Any) -> list[Section]:
    """The sections of `analyzed`, which has the same options."""
    return analyzed(points, **options).sections


def _optima(
    fits: Fits, budgets: Sequence[float] | None, extrapolate: float
) -> tuple[list[Optimum], list[float]]:
    """(optima by the parametric law, budgets of the runs whose optimum lies out of range)."""
    optima, left_out = [], []
    for budget in _own_budgets(fits.points) if budgets is None else budgets:
        try:
            best = optimum(fits.parametric, fits.cost, budget)
            check_optimum(best, fits.points, extrapolate)
        except ConfigError:
            if budgets is not None:
                raise
            left_out.append(float(budget))
        else:
            optima.append(best)
    return optima, left_out


def _own_budgets(points: Points) -> np.ndarray:
    """The mean of each group of runs, or five budgets in the range of runs without groups."""
    groups = [group for group in groups_of(points.flops) if len(group) >= 3]
    if len(groups) >= 2:
        return np.array([np.exp(np.mean(np.log(points.flops[group]))) for group in groups])
    return np.geomspace(points.flops.min(), points.flops.max(), 5)
