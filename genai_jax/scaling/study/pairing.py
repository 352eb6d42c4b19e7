"""Scores paired by seed: choice of the learning rate, differences and their intervals."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from genai_jax.config import ConfigError
from genai_jax.scaling.study.comparability import ComparisonConfig
from genai_jax.scaling.study.groups import group_of, learning_rate, seed
from genai_jax.scaling.study.results import Result

LEVEL = 0.95
RESAMPLES = 10_000


class Difference(NamedTuple):
    """Mean difference of an architecture's score to the baseline's, over paired seeds.

    The interval is None where seeds cannot be paired.
    """

    mean: float
    low: float | None
    high: float | None
    pairs: int


def chosen_rate(results: Sequence[Result], config: ComparisonConfig) -> float:
    """The learning rate that the results with the selection seed choose."""
    tried = [r for r in results if seed(r) == config.selection_seed]
    if not tried:
        raise ConfigError(
            f"{group_of(results[0])} has no finished run with "
            f"--study.selection_seed={config.selection_seed}, which chooses its learning rate"
        )
    best = min(tried, key=lambda r: r.final(config.selects_by))
    if not math.isfinite(best.final(config.selects_by)):
        raise ConfigError(
            f"{group_of(best)} diverged at every learning rate: "
            f"{', '.join(f'{learning_rate(r):g}' for r in tried)}"
        )
    return learning_rate(best)


def scored_runs(
    members: Sequence[Result], chooses: bool, config: ComparisonConfig
) -> tuple[float, list[Result]]:
    """(learning rate, scored results) of an architecture.

    chooses: whether the selection seed chooses a learning rate for any architecture, in which case
      it is scored for none.
    """
    tried = {learning_rate(r) for r in members}
    rate = chosen_rate(members, config) if len(tried) > 1 else tried.pop()
    free = [r for r in members if not chooses or seed(r) != config.selection_seed]
    return rate, [r for r in free if learning_rate(r) == rate]


def paired_difference(
    scores: Mapping[int, float], baseline: Mapping[int, float], config: ComparisonConfig, name: str
) -> Difference:
    """Mean over common seeds of score - baseline, with its confidence interval.

    Student's t: mean +- t(0.975, n - 1) s / sqrt(n). Bootstrap: percentiles of the means of
    resampled pairs (Efron 1979), which are too narrow for few seeds.
    """
    common = sorted(scores.keys() & baseline.keys())
    if len(common) < config.seeds:
        raise ConfigError(
            f"{name} and {config.baseline} have {len(common)} scored seed(s) in common; "
            f"--study.seeds={config.seeds} are needed"
        )
    values = np.array([scores[s] - baseline[s] for s in common], np.float64)
    mean, n = float(np.mean(values)), len(values)
    if not np.all(np.isfinite(values)):
        return Difference(mean, math.nan, math.nan, n)
    if config.interval == "bootstrap":
        resamples = np.random.default_rng(0).integers(0, n, (RESAMPLES, n))
        tails = [50 * (1 - LEVEL), 50 * (1 + LEVEL)]
        low, high = np.percentile(values[resamples].mean(1), tails)
        return Difference(mean, float(low), float(high), n)
    from scipy.stats import t  # here, because importing it takes long

    half = t.ppf((1 + LEVEL) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n)
    return Difference(mean, float(mean - half), float(mean + half), n)
