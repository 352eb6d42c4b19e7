"""The kinds of analysis that ``--study.analysis`` knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from genai_jax.scaling.report_types import Section
from genai_jax.scaling.study import comparison, curves, scaling_law, transfer
from genai_jax.scaling.study.comparability import ComparisonConfig
from genai_jax.scaling.study.folder import Run
from genai_jax.scaling.study.results import Result


def _all_if(check: Callable[[Sequence[Run], Any], None]) -> Callable:
    """Needs every run of a study that `check` has nothing against."""

    def needed(runs: Sequence[Run], results: Mapping[str, list[Result]], config: Any) -> list[Run]:
        check(runs, config)
        return list(runs)

    return needed


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
    needed: Callable[[Sequence[Run], Mapping[str, list[Result]], Any], list[Run]]


ANALYSES = {
    "scaling_law": Analysis(
        scaling_law.ScalingLawConfig, scaling_law.analyze, _all_if(scaling_law.check)
    ),
    "comparison": Analysis(ComparisonConfig, comparison.analyze, comparison.needed),
    "curves": Analysis(curves.CurvesConfig, curves.analyze, _all_if(curves.check)),
    "transfer": Analysis(transfer.TransferConfig, transfer.analyze, _all_if(transfer.check)),
}
