"""Scaling-law studies: one point per model, with its size, tokens, FLOPs and final loss."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from genai_jax.config import ConfigError, field
from genai_jax.scaling.fits.laws import Parametric
from genai_jax.scaling.fits.optimum import check_budget
from genai_jax.scaling.fits.points import Curve, check_enough, check_spread, make_points
from genai_jax.scaling.report_types import Section
from genai_jax.scaling.study.folder import Run
from genai_jax.scaling.study.groups import Model, models_of, run_of, unit_of
from genai_jax.scaling.study.results import Result
from genai_jax.scaling.study.settings import StudyConfig, chosen, numbers

PARAMETERS = ("non_embedding", "total", "active")
CURVE_POINTS = 3  # fewest points of a training curve


@dataclasses.dataclass(frozen=True)
class ScalingLawConfig(StudyConfig):
    held_out: str = field(
        "", "Runs to predict instead of fitting: comma-separated names, which may contain * and ?."
    )
    parameters: str = field("non_embedding", "Parameters that N counts.", choices=PARAMETERS)
    budgets: str = field(
        "",
        "Training budgets in FLOPs, comma-separated, to find the compute-optimal size and tokens "
        "for; the budgets of the runs if unset.",
    )
    extrapolate: float = field(
        1.0,
        "Largest factor by which budgets, and their optimal size and tokens, may lie outside the "
        "range of the fitted runs.",
        minimum=1,
    )
    resamples: int = field(
        1000, "Number of bootstrap resamples for the confidence intervals.", minimum=0
    )
    fit_seed: int = field(0, "Random seed for the bootstrap.", minimum=0)


def check(runs: Sequence[Run], config: ScalingLawConfig):
    """Raises `ConfigError` for a study that cannot be fitted, whatever its losses turn out to be.

    Reasons are unknown held-out runs, too few or too similar runs to fit, and budgets outside
    their range.
    """
    held_out = chosen("study.held_out", config.held_out, [run.name for run in runs])
    models = [m for m in models_of(runs) if m.name not in held_out]
    if not models:
        raise ConfigError(f"--study.held_out={config.held_out} leaves no runs to fit")
    planned = make_points(
        [_size(m, config) for m in models],
        [m.counts.tokens_per_step * m.config.train.steps for m in models],
        [1.0] * len(models),
        [m.counts.flops_per_step * m.config.train.steps for m in models],
    )
    check_enough(len(models), len(Parametric.coefficients), "the parametric law")
    check_spread(planned)
    for budget in numbers("study.budgets", config.budgets):
        check_budget(budget, planned, config.extrapolate, "study.budgets", "study.extrapolate")


def analyze(results: Sequence[Result], config: ScalingLawConfig) -> list[Section]:
    """All fits of `genai_jax.scaling.fits` to the runs; D is the number of tokens, or examples.

    Raises:
      ConfigError: too few points for a fit, or a budget outside their range.
    """
    from genai_jax.scaling.fits.analysis import scaling_law  # here, as it imports Matplotlib

    diverged = [r.name for r in results if not math.isfinite(r.final(config.metric))]
    results = [r for r in results if r.name not in diverged]
    if not results:
        raise ConfigError(f"every run diverged: {', '.join(diverged)}")
    names = [run_of(r) for r in results]
    # A pattern may match only unfinished runs, which the report lists as missing.
    held_out = set(chosen("study.held_out", config.held_out, names, missing_ok=True))
    points = make_points(
        [_size(r, config) for r in results],
        [r.tokens for r in results],
        [r.final(config.metric) for r in results],
        [r.flops for r in results],
    )
    first, *others = scaling_law(
        points,
        held_out=np.array([name in held_out for name in names]),
        curves=_curves([r for r in results if run_of(r) not in held_out], config),
        budgets=numbers("study.budgets", config.budgets) or None,
        seed=config.fit_seed,
        resamples=config.resamples,
        extrapolate=config.extrapolate,
        loss_unit=unit_of(results[0], config.metric),
    )
    if diverged:
        left_out = f"Left out because the loss is not finite: {', '.join(diverged)}."
        first = first._replace(paragraphs=[left_out, *first.paragraphs])
    return [first, *others]


def _size(model: Model | Result, config: ScalingLawConfig) -> int:
    """N of a model."""
    counts = model.counts
    return {
        "non_embedding": counts.non_embedding,
        "total": counts.parameters,
        "active": counts.active,
    }[config.parameters]


def _curves(results: Sequence[Result], config: ScalingLawConfig) -> list | None:
    """Training curves of the runs that logged the metric often enough; None if there are none."""
    curves = []
    for r in results:
        steps, values = (np.array(part, np.float64) for part in r.curve(config.metric))
        if len(steps) < CURVE_POINTS:
            continue
        tokens, flops = steps * r.counts.tokens_per_step, steps * r.counts.flops_per_step
        curves.append(Curve(_size(r, config), tokens, flops, values))
    return curves or None
