"""The points of a scaling law: one a run, from what it was and how it ended."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from genai_jax.config import ConfigError, field
from genai_jax.scaling.report import Section
from genai_jax.scaling.study.folder import Run
from genai_jax.scaling.study.results import Result
from genai_jax.scaling.study.settings import StudyConfig, chosen, numbers

PARAMETERS = ("non_embedding", "total", "active")


@dataclasses.dataclass(frozen=True)
class ScalingLawConfig(StudyConfig):
    held_out: str = field(
        "", "runs that are predicted, not fitted: names, with * and ?, comma-separated"
    )
    parameters: str = field("non_embedding", "what N counts", choices=PARAMETERS)
    budgets: str = field("", "compute of the isoFLOP profiles in FLOPs, comma-separated")
    resamples: int = field(1000, "bootstrap resamples of the intervals", minimum=0)
    fit_seed: int = field(0, "of the resamples", minimum=0)


def check(runs: Sequence[Run], config: ScalingLawConfig):
    """Raises `ConfigError` for held-out runs or budgets that are wrong."""
    held_out = chosen("study.held_out", config.held_out, [run.name for run in runs])
    if len(held_out) == len(runs):
        raise ConfigError(f"--study.held_out={config.held_out} leaves no run to fit")
    numbers("study.budgets", config.budgets)


def analyze(results: Sequence[Result], config: ScalingLawConfig) -> list[Section]:
    """Every fit of `genai_jax.scaling.fits` on the runs; D is the tokens, or examples, seen."""
    from genai_jax.scaling.fits.analysis import scaling_law
    from genai_jax.scaling.fits.points import Points

    count = {
        "non_embedding": lambda r: r.counts.non_embedding,
        "total": lambda r: r.counts.parameters,
        "active": lambda r: r.counts.active,
    }[config.parameters]
    points = Points(
        parameters=np.array([count(r) for r in results], np.float64),
        tokens=np.array([r.tokens for r in results], np.float64),
        flops=np.array([r.flops for r in results], np.float64),
        loss=np.array([r.final(config.metric) for r in results], np.float64),
    )
    names = [r.name for r in results]
    held_out = set(chosen("study.held_out", config.held_out, names))
    try:
        return scaling_law(
            points,
            held_out=np.array([name in held_out for name in names]),
            budgets=numbers("study.budgets", config.budgets) or None,
            seed=config.fit_seed,
            resamples=config.resamples,
        )
    except ConfigError:
        raise
    except ValueError as error:  # too few points, a budget out of reach
        raise ConfigError(str(error)) from None
