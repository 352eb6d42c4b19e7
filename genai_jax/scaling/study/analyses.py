"""The analyses that ``--study.analysis`` can choose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from genai_jax.scaling.report_types import Section
from genai_jax.scaling.study import comparison, curves, scaling_law, transfer
from genai_jax.scaling.study.comparability import ComparisonConfig
from genai_jax.scaling.study.folder import Run
from genai_jax.scaling.study.results import Result


def _all_if(check: Callable[[Sequence[Run], Any], None]) -> Callable:
    """An `Analysis.needed` that asks for every run, once `check` has accepted the study."""

    def needed(runs: Sequence[Run], results: Mapping[str, list[Result]], config: Any) -> list[Run]:
        check(runs, config)
        return list(runs)

    return needed


class Analysis(NamedTuple):
    """An analysis of the results of a study.

    Attributes:
      config: its flags, a `StudyConfig`.
      analyze: (results, flags) -> sections of the report.
      needed: (runs, results so far, flags) -> the runs that it needs. Raises `ConfigError`, before
        anything is trained, for a study that it could not analyze. Called again after these runs
        have finished, until it needs no others.
      follow_ups: (runs, results so far, flags) -> the choices that the results will make: for each,
        its alternatives, each with the runs that will be needed then.
    """

    config: type
    analyze: Callable[[Sequence[Result], Any], list[Section]]
    needed: Callable[[Sequence[Run], Mapping[str, list[Result]], Any], list[Run]]
    follow_ups: Callable[
        [Sequence[Run], Mapping[str, list[Result]], Any], list[list[list[Run]]]
    ] = lambda *_: []


ANALYSES = {
    "scaling_law": Analysis(
        scaling_law.ScalingLawConfig, scaling_law.analyze, _all_if(scaling_law.check)
    ),
    "comparison": Analysis(
        ComparisonConfig, comparison.analyze, comparison.needed, comparison.follow_ups
    ),
    "curves": Analysis(curves.CurvesConfig, curves.analyze, _all_if(curves.check)),
    "transfer": Analysis(transfer.TransferConfig, transfer.analyze, _all_if(transfer.check)),
}
