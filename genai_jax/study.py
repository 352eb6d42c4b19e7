"""Runs a study: trains every flagfile of a folder that has no result yet, then writes a report.

python -m genai_jax.study --study=experiments/NAME --workdir=D [--flag=value ...]

The folder holds README.md (the question), study.flags (--study.analysis=... and its flags), and one
flagfile per run, which may include a base.flags. Finished runs are skipped and interrupted ones
resumed. The runs go to D/runs, the report to D/report.
In Python, `genai_jax.study(study, workdir, ...)` does the same and returns the report.
"""

import dataclasses
import functools
import os
import pathlib
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from genai_jax.callable_commands import callable_as
from genai_jax.command import run
from genai_jax.components import make_task, parse_run
from genai_jax.config import (
    ConfigError,
    asks_for_help,
    field,
    help_text,
    last_value,
    parse,
)
from genai_jax.flagfiles import expand_flagfiles
from genai_jax.keyword_flags import as_flags
from genai_jax.scaling.reported import Report, Rows
from genai_jax.scaling.study import times
from genai_jax.scaling.study.analyses import ANALYSES
from genai_jax.scaling.study.expected import read_expected
from genai_jax.scaling.study.folder import Study, check_folder, read_study
from genai_jax.scaling.study.launch import commands
from genai_jax.scaling.study.overview import Plan, plan_text, times_text
from genai_jax.scaling.study.session import State, check, report, state_of, train_missing
from genai_jax.scaling.study.settings import StudyConfig, chosen
from genai_jax.shipped import shipped
from genai_jax.training.lock import locked

LAUNCHERS = ("none", "print", "slurm")


@dataclasses.dataclass(frozen=True)
class StudyRequest:
    study: str = field("", "Folder of the study.", path=True)
    workdir: str = field("", "Folder for the runs and the report.", path=True)
    jobs: int = field(
        1, "Number of runs to train at a time, each in a process on its own share of the CPU "
        "cores; on a machine with accelerators they would compete for the same devices. 0 trains "
        "them one after another in the process of the study itself.", minimum=0,
    )  # fmt: skip
    only: str = field(
        "", "Runs to train: comma-separated names, which may contain * and ?; all if unset."
    )
    dry_run: bool = field(
        False, "Print which runs would be trained and how long they would take, but train nothing."
    )
    flops_per_second: float | None = field(
        None,
        "Assumed speed for the time estimate of a dry run; if unset, the speed of finished runs, "
        "or else of a few steps of two of the runs.",
        minimum=1,
    )
    launcher: str = field(
        "none", "Print the commands that train the runs on another machine, but train nothing.",
        choices=LAUNCHERS,
    )  # fmt: skip
    launcher_options: str = field(
        "", "Options to pass to slurm.sh, such as --nodes=1 --partition=gpu."
    )
    check: bool = field(
        False, "Check the numbers of the report against expected.json in the study's folder."
    )


@dataclasses.dataclass(frozen=True, repr=False)
class StudyReport(Report):
    """The report of a study.

    Attributes:
      runs: a row for each run: name, state, parameters, tokens, flops, and, in a dry run, seconds.
      failed: run -> its error.
      deviations: with `check`, the numbers that deviate from expected.json.
      commands: with `launcher`, the commands that train the missing runs elsewhere.
      reason: why there is no report; empty if there is one.
    """

    runs: Rows = dataclasses.field(default_factory=Rows)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    deviations: list[str] = dataclasses.field(default_factory=list)
    commands: list[str] = dataclasses.field(default_factory=list)
    reason: str = ""


def study(
    study: str | os.PathLike,
    workdir: str | os.PathLike,
    *,
    flags: Mapping[str, Any] | None = None,
    **options: Any,
) -> StudyReport:
    """Trains the missing runs of a study, and writes and returns its report.

    An interrupt lets the runs save; a further call goes on from there.

    Args:
      study: folder of the study.
      workdir: folder for the runs and the report.
      flags: of its analysis: {"study.metric": "eval/bits_per_byte"}.
      **options: flags of the study command: `jobs`, `only`, `dry_run`, `check`, ... With `jobs=0`
        the runs are trained in this process, which may already hold the accelerator.

    Raises:
      ConfigError: the folder is not a study, the analysis cannot use it, or its finished runs are
        too few for a report although none was left out by `only`.
      KeyboardInterrupt: an interrupt.
    """
    places = {"study": os.fspath(study), "workdir": os.fspath(workdir)}
    argv = as_flags({**places, **options, **(flags or {})})
    asked = _Asked.of(*_parse(argv))
    if asked.only_announces:
        return _announced(asked, lambda text: None)
    done = _run(asked, argv)
    if done.stopped_by:
        signal.raise_signal(done.stopped_by)
    if done.report.reason and not asked.request.only:
        failed = [f"{name} failed: {error}" for name, error in done.report.failed.items()]
        raise ConfigError("; ".join([done.report.reason, *failed]))
    return done.report


def main(argv: Sequence[str]) -> int:
    if asks_for_help(argv):
        print(help_text(__doc__, {"run": StudyRequest}))
        for name, analysis in ANALYSES.items():
            print("\n" + help_text(f"--study.analysis={name}", {"study": analysis.config}))
        return 0
    import jax

    request, settings = _parse(argv)
    if request.jobs:  # leaves the accelerators to the processes of the runs
        jax.config.update("jax_platforms", "cpu")
    asked = _Asked.of(request, settings)
    if asked.only_announces:
        _announced(asked, functools.partial(print, flush=True))
        return 0
    return _say_how_it_ended(asked, _run(asked, argv), argv)


class _Asked(NamedTuple):
    """What a study is asked for, and where it stands."""

    request: StudyRequest
    settings: StudyConfig
    study: Study
    state: State
    only: list[str]

    @classmethod
    def of(cls, request: StudyRequest, settings: StudyConfig) -> "_Asked":
        folders = pathlib.Path(request.study), pathlib.Path(request.workdir)
        study = read_study(*folders, parse_run, make_task)
        state = state_of(study, settings)
        only = chosen("only", request.only or "*", [r.name for r in study.runs])
        return cls(request, settings, study, state, only)

    @property
    def only_announces(self) -> bool:
        return self.request.dry_run or self.request.launcher != "none"


class _Done(NamedTuple):
    report: StudyReport
    stopped_by: int  # signal that stopped the study, 0 if none did


def _parse(argv: Sequence[str]):
    """The flags of the command, and those of the analysis, some of which study.flags sets."""
    argv = expand_flagfiles(argv)
    for name, what in (("study", "folder of the study"), ("workdir", "folder for its runs")):
        if not last_value(argv, name):
            raise ConfigError(f"--{name} is not set: name the {what}")
    place = shipped(last_value(argv, "study"))
    argv = [*argv, f"--study={place}"]
    folder = pathlib.Path(place)
    check_folder(folder)
    argv = expand_flagfiles([f"--flagfile={folder / 'study.flags'}", *argv])
    kind = last_value(argv, "study.analysis")
    if kind not in ANALYSES:
        raise ConfigError(
            f"--study.analysis={kind or '(unset)'} is not one of {', '.join(ANALYSES)}"
        )
    components = {"run": StudyRequest, "study": ANALYSES[kind].config}
    config, given = parse(argv, components, user=f"--study.analysis={kind}")
    _check_together(config.run, given)
    return config.run, config.study


def _check_together(request: StudyRequest, given: set[str]):
    """Raises `ConfigError` for a flag that another flag leaves without effect."""
    launches = request.launcher != "none"
    for name, is_used, only in (
        ("dry_run", not launches, "without --launcher"),
        ("check", not launches and not request.dry_run, "without --launcher and --dry_run"),
        ("jobs", not launches, "without --launcher"),
        ("flops_per_second", request.dry_run, "with --dry_run"),
        ("launcher_options", request.launcher == "slurm", "with --launcher=slurm"),
    ):
        if name in given and getattr(request, name) and not is_used:
            raise ConfigError(f"--{name} has an effect only {only}")


def _announced(asked: _Asked, show: Callable[[str], object]) -> StudyReport:
    """Which runs would be trained, or the commands that train them elsewhere; `show` gets texts."""
    request, state = asked.request, asked.state
    runs = [r for r in state.missing if r.name in asked.only]
    if request.launcher != "none":
        lines = commands(request.launcher, request.launcher_options, runs)
        show("\n".join(lines))
        return StudyReport([], runs=_rows(asked.study, state), commands=lines)
    plan = Plan.of(asked.study.runs, state, asked.only)
    show(plan_text(plan))
    if not runs:
        return StudyReport([], runs=_rows(asked.study, state))
    if request.flops_per_second:
        speed = times.given(request.flops_per_second)
    else:
        speed = times.from_finished(plan.finished)
    if not speed:
        _say("timing a few steps of the cheapest and the most expensive run")
        speed = times.calibrated(runs, max(request.jobs, 1))
    show(times_text(plan, speed, max(request.jobs, 1)))
    return StudyReport([], runs=_rows(asked.study, state, speed=speed))


def _run(asked: _Asked, argv: Sequence[str]) -> _Done:
    """Trains, reports and checks."""
    request, settings, study = asked.request, asked.settings, asked.study
    from genai_jax.trainer import train_here

    workdir = pathlib.Path(request.workdir)
    if request.check:
        read_expected(study.folder)  # mistakes in it are reported before anything is trained
    with locked(workdir, "study", ", or by runs that outlived it") as lock:
        failed, stopped_by = train_missing(
            study, settings, asked.only, request.jobs, lock, train_here
        )
        rows = _rows(study, state_of(study, settings), failed)
        done = StudyReport([], runs=rows, failed=failed)
        if stopped_by:
            return _Done(done, stopped_by)
        try:
            written = report(study, settings, workdir, failed, argv)
        except ConfigError as error:
            return _Done(dataclasses.replace(done, reason=str(error)), 0)
        off = check(study, workdir) if request.check else []
    done = dataclasses.replace(done, sections=written.sections, page=written.page, deviations=off)
    return _Done(done, 0)


def _say_how_it_ended(asked: _Asked, done: _Done, argv: Sequence[str]) -> int:
    """Prints how a study ended; returns the exit code."""
    request, ended = asked.request, done.report
    for name, error in ended.failed.items():
        log = pathlib.Path(request.workdir) / "runs" / name / "train.log"
        _say(f"{name} failed: {error}" + (f" (see {log})" if request.jobs else ""))
    if done.stopped_by:
        again = shlex.join(["python", "-m", "genai_jax.study", *argv])
        _say(f"stopped by signal {done.stopped_by}; to resume: {again}")
        return 128 + done.stopped_by
    if ended.reason:
        _say(f"no report: {ended.reason}")
        # With --only there may not be enough runs for a report.
        return 1 if ended.failed or request.check or not request.only else 0
    print(f"report: {ended.page}")
    for line in ended.deviations:
        _say(f"error: {line}")
    if request.check and not ended.deviations:
        print("every number agrees with expected.json")
    return 1 if ended.failed or ended.deviations else 0


def _rows(
    study: Study, state: State, failed: Mapping[str, str] = {}, speed: times.Speed | None = None
) -> Rows:
    """A row for each run."""
    missing = {run.name for run in state.missing}
    kind = lambda run: (
        "failed" if run.name in failed
        else "finished" if run.name in state.results
        else "missing" if run.name in missing else "not needed"
    )  # fmt: skip
    return Rows(
        {
            "name": run.name,
            "state": kind(run),
            "parameters": run.counts.non_embedding,
            "tokens": run.counts.tokens_per_step * run.steps * run.members,
            "flops": run.flops,
            **({"seconds": speed.seconds(run)} if speed and run.name in missing else {}),
        }
        for run in study.runs
    )


def _say(text: str):
    print(text, file=sys.stderr)


callable_as(study)

if __name__ == "__main__":
    run(main)
