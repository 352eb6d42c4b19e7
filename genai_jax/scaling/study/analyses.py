"""The kinds of analysis that ``--study.analysis`` knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from genai_jax.scaling.report import Section
from genai_jax.scaling.study import comparison, curves, scaling_law, transfer
from genai_jax.scaling.study.comparability import ComparisonConfig
from genai_jax.scaling.study.folder import Run
from genai_jax.scaling.study.results import Result


def _all(runs: Sequence[Run], results: Mapping[str, list[Result]], config: Any) -> list[Run]:
    return list(runs)


def _fittable(runs, results, config) -> list[Run]:
    scaling_law.check(runs, config)
    return list(runs)


class Analysis(NamedTuple):
    """One of them.

    Attributes:
      config: its flags, a `StudyConfig`.
      analyze: (results, flags) -> sections of the report.
      needed: (runs, results so far, flags) -> the runs that it needs; raises `ConfigError`, before
        anything runs, for a study that it could not analyze. Asked again when those are finished.
    """

    config: type
    analyze: Callable[[Sequence[Result], Any], list[Section]]
    needed: Callable[[Sequence[Run], Mapping[str, list[Result]], Any], list[Run]] = _all


ANALYSES = {
    "scaling_law": Analysis(scaling_law.ScalingLawConfig, scaling_law.analyze, _fittable),
    "comparison": Analysis(ComparisonConfig, comparison.analyze, comparison.needed),
    "curves": Analysis(curves.CurvesConfig, curves.analyze),
    "transfer": Analysis(transfer.TransferConfig, transfer.analyze),
}
