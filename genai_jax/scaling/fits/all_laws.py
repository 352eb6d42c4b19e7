"""Fits all laws to one set of runs."""

from __future__ import annotations

from typing import NamedTuple

from genai_jax.config import ConfigError
from genai_jax.scaling.fits.envelope import Envelope, fit_envelope
from genai_jax.scaling.fits.fit import Fit, fit
from genai_jax.scaling.fits.isoflop import IsoFlop, fit_isoflop
from genai_jax.scaling.fits.laws import KaplanJoint, Parametric
from genai_jax.scaling.fits.optimum import Cost, fit_cost
from genai_jax.scaling.fits.points import Curve, Points
from genai_jax.scaling.fits.power_law import KAPLAN, KaplanLaw, fit_kaplan
from genai_jax.scaling.fits.variable_projection import Projected, fit_projected


class Fits(NamedTuple):
    """All laws, fitted to the same runs; a string says why the runs do not allow that fit."""

    points: Points
    parametric: Fit
    projected: Projected
    joint: Fit
    single: dict[str, KaplanLaw | str]  # key of `KAPLAN` -> law
    isoflop: IsoFlop | str
    envelope: Envelope | str
    cost: Cost


def fit_all(points: Points, curves: list[Curve] | None, seed: int, resamples: int) -> Fits:
    """Raises `ConfigError` if the laws of both N and D, which the rest needs, cannot be fitted."""
    options = dict(resamples=resamples, seed=seed)
    return Fits(
        points=points,
        parametric=fit(Parametric(), points, **options),
        projected=fit_projected(points, **options),
        joint=fit(KaplanJoint(), points, **options),
        single={of: _or_reason(fit_kaplan, points, of=of, **options) for of in KAPLAN},
        isoflop=_or_reason(fit_isoflop, points, **options),
        envelope=_or_reason(fit_envelope, curves, **options) if curves else "no curves were given",
        cost=fit_cost(points),
    )


def _or_reason(fit_it, data, **options):
    try:
        return fit_it(data, **options)
    except ConfigError as reason:
        return str(reason)
