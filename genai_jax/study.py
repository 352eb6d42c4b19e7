"""Runs a study: trains every flagfile of a folder that has no result yet, then writes a report.

python -m genai_jax.study --study=experiments/NAME --workdir=D [--flag=value ...]

The folder holds README.md (the question), study.flags (--study.analysis=... and its flags), and one
flagfile per run, which may include a base.flags. Finished runs are skipped and interrupted ones
resumed. The runs go to D/runs, the report to D/report.
"""

import dataclasses
import pathlib
import shlex
import sys
from collections.abc import Sequence

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
from genai_jax.scaling.study import times
from genai_jax.scaling.study.analyses import ANALYSES
from genai_jax.scaling.study.expected import read_expected
from genai_jax.scaling.study.folder import check_folder, read_study
from genai_jax.scaling.study.launch import commands
from genai_jax.scaling.study.overview import Plan, plan_text, times_text
from genai_jax.scaling.study.session import check, report, state_of, train_missing
from genai_jax.scaling.study.settings import chosen
from genai_jax.shipped import shipped
from genai_jax.training.lock import locked

LAUNCHERS = ("none", "print", "slurm")


@dataclasses.dataclass(frozen=True)
class StudyRequest:
    study: str = field("", "Folder of the study.", path=True)
    workdir: str = field("", "Folder for the runs and the report.", path=True)
    jobs: int = field(
        1, "Number of runs to train at a time, each on its own share of the CPU cores; on a "
        "machine with accelerators they would compete for the same devices.", minimum=1,
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


def main(argv: Sequence[str]) -> int:
    if asks_for_help(argv):
        print(help_text(__doc__, {"run": StudyRequest}))
        for name, analysis in ANALYSES.items():
            print("\n" + help_text(f"--study.analysis={name}", {"study": analysis.config}))
        return 0
    import jax

    request, settings = _parse(argv)
    # Leaves the accelerators to the processes of the runs.
    jax.config.update("jax_platforms", "cpu")
    workdir = pathlib.Path(request.workdir)
    study = read_study(pathlib.Path(request.study), workdir, parse_run, make_task)
    state = state_of(study, settings)
    only = chosen("only", request.only or "*", [r.name for r in study.runs])
    if request.dry_run or request.launcher != "none":
        _announce(request, study, state, only)
        return 0
    return _run(request, settings, study, only, argv)


def _parse(argv: Sequence[str]):
    """The flags of the command, and those of the analysis, some of which study.flags sets."""
    argv = expand_flagfiles(argv)
    for name, what in (("study", "folder of the study"), ("workdir", "folder for its runs")):
        if not last_value(argv, name):
            raise ConfigError(f"--{name} is not set: name the {what}")
    if (place := shipped(last_value(argv, "study"))) != last_value(argv, "study"):
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


def _announce(request: StudyRequest, study, state, only: Sequence[str]):
    """Prints which runs would be trained, or the commands that train them elsewhere."""
    runs = [r for r in state.missing if r.name in only]
    if request.launcher != "none":
        print("\n".join(commands(request.launcher, request.launcher_options, runs)))
        return
    plan = Plan.of(study.runs, state, only)
    print(plan_text(plan), flush=True)
    if not runs:
        return
    if request.flops_per_second:
        speed = times.given(request.flops_per_second)
    else:
        speed = times.from_finished(plan.finished)
    if not speed:
        _say("timing a few steps of the cheapest and the most expensive run")
        speed = times.calibrated(runs, request.jobs)
    print(times_text(plan, speed, request.jobs))


def _run(request: StudyRequest, settings, study, only: Sequence[str], argv: Sequence[str]) -> int:
    """Trains, reports and checks; returns the exit code."""
    workdir = pathlib.Path(request.workdir)
    if request.check:
        read_expected(study.folder)  # mistakes in it are reported before anything is trained
    with locked(workdir, "study", ", or by runs that outlived it") as lock:
        failed, stopped_by = train_missing(study, settings, only, request.jobs, lock)
        for name, error in failed.items():
            _say(f"{name} failed: {error} (see {workdir / 'runs' / name / 'train.log'})")
        if stopped_by:
            again = shlex.join(["python", "-m", "genai_jax.study", *argv])
            _say(f"stopped by signal {stopped_by}; to resume: {again}")
            return 128 + stopped_by
        try:
            print(f"report: {report(study, settings, workdir, failed, argv)}")
        except ConfigError as error:
            _say(f"no report: {error}")
            # With --only there may not be enough runs for a report.
            return 1 if failed or request.check or not request.only else 0
        deviations = check(study, workdir) if request.check else []
    for line in deviations:
        _say(f"error: {line}")
    if request.check and not deviations:
        print("every number agrees with expected.json")
    return 1 if failed or deviations else 0


def _say(text: str):
    print(text, file=sys.stderr)


if __name__ == "__main__":
    run(main)
