"""Runs a study: trains the missing runs, in waves, and writes the report."""

from __future__ import annotations

import pathlib
import shlex
from collections.abc import Callable, Sequence
from typing import IO, Any, NamedTuple

from genai_jax.config import Config, ConfigError
from genai_jax.files import read_text
from genai_jax.scaling.report import read_numbers, write_report
from genai_jax.scaling.reported import Report
from genai_jax.scaling.study.analyses import ANALYSES
from genai_jax.scaling.study.expected import off, read_expected
from genai_jax.scaling.study.folder import Run, Study
from genai_jax.scaling.study.overview import runs_section
from genai_jax.scaling.study.results import Result, environments, is_finished, read_results
from genai_jax.scaling.study.runs import Outcome, execute, execute_here
from genai_jax.scaling.study.settings import StudyConfig
from genai_jax.scaling.study.table import make_display


class State(NamedTuple):
    """The state of a study in its workdir."""

    needed: list[Run]  # runs that the analysis needs, as far as is known so far
    missing: list[Run]  # needed runs that have not finished
    results: dict[str, list[Result]]  # results of the needed runs that have
    choices: Sequence[list[list[Run]]] = ()  # see `Analysis.follow_ups`


def state_of(study: Study, settings: StudyConfig) -> State:
    """Which runs are needed, missing and finished.

    Raises:
      ConfigError: the analysis cannot use the study, or a workdir holds a run with other flags.
    """
    finished = {
        run.name: read_results(run) for run in study.runs if is_finished(run, settings.may_diverge)
    }
    analysis = ANALYSES[settings.analysis]
    needed = analysis.needed(study.runs, finished, settings)
    choices = analysis.follow_ups(study.runs, finished, settings)
    missing = [run for run in needed if run.name not in finished]
    results = {run.name: finished[run.name] for run in needed if run.name in finished}
    return State(needed, missing, results, choices)


def train_missing(
    study: Study, settings: StudyConfig, only: Sequence[str], jobs: int, lock: IO,
    train: Callable[[Config], object],
) -> Outcome:  # fmt: skip
    """Trains until only failed runs are missing; finished runs may make others needed.

    With 0 `jobs`, `train` trains them in this process.
    """
    failed: dict[str, str] = {}
    while True:
        state = state_of(study, settings)
        runs = [r for r in state.missing if r.name in only and r.name not in failed]
        if not runs:
            return Outcome(failed, 0)
        finished = [run for run in state.needed if run not in state.missing]
        display = make_display([*finished, *runs], finished, settings.metric)
        options = dict(display=display, may_diverge=settings.may_diverge)
        if jobs:
            outcome = execute(runs, jobs=jobs, lock=lock, **options)
        else:
            outcome = execute_here(runs, train=train, **options)
        failed |= outcome.failed
        if outcome.signal:
            return Outcome(failed, outcome.signal)
        for run in runs:
            if run.name not in failed and not is_finished(run, settings.may_diverge):
                failed[run.name] = "its process exited without an error, but the run is incomplete"


def report(
    study: Study, settings: StudyConfig, workdir: pathlib.Path, failed: dict[str, str],
    argv: Sequence[str],
) -> Report:  # fmt: skip
    """Writes the report of the finished runs into ``workdir/report``.

    Raises:
      ConfigError: the finished runs are not enough for the analysis.
    """
    state = state_of(study, settings)
    if not state.results:
        raise ConfigError("no run has finished")
    results = [result for models in state.results.values() for result in models]
    finished = [run for run in state.needed if run.name in state.results]
    sections = ANALYSES[settings.analysis].analyze(results, settings)
    sections = [*sections, runs_section(finished, state.results, settings.metric)]
    folder = workdir / "report"
    write_report(
        folder, study.title, sections,
        record=_record(study, state, finished, failed, argv),
    )  # fmt: skip
    return Report(sections, folder / "index.html")


def _record(study, state: State, finished: Sequence[Run], failed, argv) -> dict[str, Any]:
    missing = [
        f"{run.name} is missing" + (f": {failed[run.name]}" if run.name in failed else "")
        for run in state.missing
    ]
    return {
        "question": study.question,
        "warnings": missing,
        "commands": [
            shlex.join(["python", "-m", "genai_jax.study", *_lasting(argv)]),
            "# A single run, with its flags from below saved as RUN.flags:",
            "python -m genai_jax.train --flagfile=RUN.flags --workdir=runs/RUN",
        ],
        "environment": environments(finished),
        "flags": {run.name: read_text(run.workdir / "flags.txt") for run in finished},
    }


def _lasting(argv: Sequence[str]) -> list[str]:
    """The arguments without those that do not affect the content of the report."""
    return [a for a in argv if not a.lstrip("-").startswith(("only", "jobs", "check"))]


def check(study: Study, workdir: pathlib.Path) -> list[str]:
    """A line for each number of the report that deviates from the study's expected.json."""
    return off(read_numbers(workdir / "report" / "results.json"), read_expected(study.folder))
