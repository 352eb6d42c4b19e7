"""Everything that the fits say about a set of runs, as sections of a report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from genai_jax.config import ConfigError
from genai_jax.scaling.fits import sections
from genai_jax.scaling.fits.all_laws import Fits, fit_all
from genai_jax.scaling.fits.bootstrap import RESAMPLES
from genai_jax.scaling.fits.isoflop import budgets as groups_of
from genai_jax.scaling.fits.optimum import Optimum, check_budget, check_optimum, optimum
from genai_jax.scaling.fits.points import Curve, Points
from genai_jax.scaling.report_types import Section


def scaling_law(
    points: Points,
    *,
    held_out: np.ndarray | None = None,
    curves: list[Curve] | None = None,
    budgets: Sequence[float] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    extrapolate: float = 1.0,
    loss_unit: str = "nats per token",
) -> list[Section]:
    """Fits every law to the runs that are not held out, and predicts those that are.

    Args:
      points: all runs.
      held_out: [points] bool, runs that are predicted and not fitted.
      curves: of the runs that are not held out, for the envelope.
      budgets: FLOPs to find the best size and tokens for; those of the runs if not given.
      seed: of the resamples.
      resamples: of the bootstrap; 0 leaves intervals out.
      extrapolate: how far beyond the fitted runs, as a factor, a budget and its best size and
        tokens may be.
      loss_unit: of the loss, for headings.

    Raises:
      ConfigError: fewer runs than coefficients, or a budget outside of what the runs allow.
    """
    held_out = np.zeros(len(points.loss), bool) if held_out is None else np.asarray(held_out, bool)
    fitted = points.where(~held_out)
    for budget in budgets or ():
        check_budget(budget, fitted, extrapolate)
    fits = fit_all(fitted, curves, seed, resamples)
    hidden = points.where(held_out)
    found, left_out = _optima(fits, budgets, extrapolate)
    parts = [
        sections.joint(fits, hidden, loss_unit),
        sections.single(fits, loss_unit),
        sections.isoflop(fits, loss_unit),
        sections.envelope(fits, curves, loss_unit),
        sections.optimum(fits, found, left_out, extrapolate),
    ]
    return parts + ([sections.held_out(fits, hidden, loss_unit)] if held_out.any() else [])


def _optima(
    fits: Fits, budgets: Sequence[float] | None, extrapolate: float
) -> tuple[list[Optimum], list[float]]:
    """By the parametric law, and those of the runs' own budgets that it cannot judge."""
    found, left_out = [], []
    for budget in _own_budgets(fits.points) if budgets is None else budgets:
        try:
            best = optimum(fits.parametric, fits.cost, budget)
            check_optimum(best, fits.points, extrapolate)
        except ConfigError:
            if budgets is not None:
                raise
            left_out.append(float(budget))
        else:
            found.append(best)
    return found, left_out


def _own_budgets(points: Points) -> np.ndarray:
    """Means of groups of runs, or five in the range of runs that are no groups."""
    groups = [group for group in groups_of(points.flops) if len(group) >= 3]
    if len(groups) >= 2:
        return np.array([np.exp(np.mean(np.log(points.flops[group]))) for group in groups])
    return np.geomspace(points.flops.min(), points.flops.max(), 5)
