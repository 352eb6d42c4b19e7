"""Runs a study: trains the flagfiles of a folder that are missing, then writes its report.

python -m genai_jax.study --study=experiments/NAME --workdir=D [--flag=value ...]

The folder holds README.md (the question), study.flags (--study.analysis=... and its flags), and a
flagfile for every run, which may include a base.flags. What is finished is skipped, what was
stopped goes on. Runs lie in D/runs, the report in D/report.
"""

import dataclasses
import pathlib
import shlex
import sys
from collections.abc import Sequence

from genai_jax.command import run
from genai_jax.components import make_task, parse_run
from genai_jax.config import ConfigError, field, flag_names, help_text, parse

LAUNCHERS = ("none", "print", "slurm")


@dataclasses.dataclass(frozen=True)
class StudyRequest:
    study: str = field("", "folder of the study")
    workdir: str = field("", "folder for its runs and its report")
    jobs: int = field(
        1, "runs trained at a time, each on its share of the cores; on a machine with accelerators "
        "they would all take the same ones", minimum=1,
    )  # fmt: skip
    only: str = field("", "runs to train: names, with * and ?, comma-separated; all if unset")
    dry_run: bool = field(False, "only say what would be trained, and how long it would take")
    flops_per_second: float | None = field(
        None,
        "speed for the expected time of a dry run; if unset, as finished runs had it, else as a "
        "few steps of two of them take",
        minimum=1,
    )
    launcher: str = field("none", "print commands for elsewhere, train nothing", choices=LAUNCHERS)
    launcher_options: str = field("", "of slurm.sh, e.g. --nodes=1 --partition=gpu")
    check: bool = field(False, "compare the report's numbers with the folder's expected.json")


def main(argv: Sequence[str]) -> int:
    from genai_jax.scaling.study.analyses import ANALYSES

    if {"--help", "-h"} & set(argv):
        print(help_text(__doc__, {"run": StudyRequest}))
        for name, analysis in ANALYSES.items():
            print("\n" + help_text(f"--study.analysis={name}", {"study": analysis.config}))
        return 0
    request, settings = _parse(argv)
    import jax

    # Accelerators are for the processes of the runs.
    jax.config.update("jax_platforms", "cpu")
    from genai_jax.scaling.study.folder import read_study
    from genai_jax.scaling.study.session import state_of
    from genai_jax.scaling.study.settings import chosen

    workdir = pathlib.Path(request.workdir)
    study = read_study(pathlib.Path(request.study), workdir, parse_run, make_task)
    state = state_of(study, settings)
    only = chosen("only", request.only or "*", [r.name for r in study.runs])
    if request.dry_run or request.launcher != "none":
        _announce(request, study, state, only)
        return 0
    return _run(request, settings, study, only, argv)


def _parse(argv: Sequence[str]):
    """The flags of the command, and those of the study, of which study.flags sets some."""
    from genai_jax.scaling.study.analyses import ANALYSES
    from genai_jax.scaling.study.folder import check_folder

    every = _joined([analysis.config for analysis in ANALYSES.values()])
    request = parse(argv, {"run": StudyRequest, "study": every})[0].run
    for name, says in (("study", "which folder"), ("workdir", "where its runs go")):
        if not getattr(request, name):
            raise ConfigError(f"--{name} is not set: say {says}")
    check_folder(pathlib.Path(request.study))
    argv = [f"--flagfile={pathlib.Path(request.study, 'study.flags')}", *argv]
    found, given = parse(argv, {"run": StudyRequest, "study": every})
    kind = found.study.analysis
    if kind not in ANALYSES:
        raise ConfigError(f"--study.analysis={kind or '(unset)'} is none of {', '.join(ANALYSES)}")
    _check_together(request, given)
    components = {"run": StudyRequest, "study": ANALYSES[kind].config}
    for name in sorted(given - flag_names(components)):
        own = ", ".join(f"--{n}" for n in sorted(flag_names({"study": ANALYSES[kind].config})))
        raise ConfigError(f"--{name} is not used by --study.analysis={kind}, whose flags are {own}")
    config, _ = parse(argv, components)
    return config.run, config.study


def _check_together(request: StudyRequest, given: set[str]):
    """Raises `ConfigError` for flags of which one makes the other one mean nothing."""
    launches = request.launcher != "none"
    for name, is_used, only in (
        ("dry_run", not launches, "without --launcher"),
        ("check", not launches and not request.dry_run, "without --launcher and --dry_run"),
        ("jobs", not launches, "without --launcher"),
        ("flops_per_second", request.dry_run, "with --dry_run"),
        ("launcher_options", request.launcher == "slurm", "with --launcher=slurm"),
    ):
        if name in given and getattr(request, name) and not is_used:
            raise ConfigError(f"--{name} is used only {only}")


def _joined(classes: Sequence[type]) -> type:
    """One dataclass with the fields of all."""
    fields = {f.name: f for cls in classes for f in dataclasses.fields(cls)}
    return dataclasses.make_dataclass(
        "Joined",
        [(f.name, f.type, dataclasses.field(default=f.default, metadata=f.metadata))
         for f in fields.values()],
        frozen=True,
    )  # fmt: skip


def _announce(request: StudyRequest, study, state, only: Sequence[str]):
    """Prints what would be trained, or the commands that train it elsewhere."""
    from genai_jax.scaling.study import times
    from genai_jax.scaling.study.launch import commands
    from genai_jax.scaling.study.overview import plan_text

    runs = [r for r in state.missing if r.name in only]
    if request.launcher != "none":
        print("\n".join(commands(request.launcher, request.launcher_options, runs)))
        return
    finished = [r for r in state.needed if r.name in state.results]
    others = [r for r in study.runs if r not in runs and r not in finished]
    speed = None
    if runs and request.flops_per_second:
        speed = times.given(request.flops_per_second)
    elif runs:
        speed = times.from_finished(finished)
        if not speed:
            _say("taking a few steps of the cheapest and the dearest run, to time them")
            speed = times.calibrated(runs, request.jobs)
    print(plan_text(runs, finished, others, speed, request.jobs))


def _run(request: StudyRequest, settings, study, only: Sequence[str], argv: Sequence[str]) -> int:
    """Trains, reports, checks; 1 if something failed."""
    from genai_jax.scaling.study.cores import locked
    from genai_jax.scaling.study.expected import read_expected
    from genai_jax.scaling.study.session import check, report, train_missing

    workdir = pathlib.Path(request.workdir)
    if request.check:
        read_expected(study.folder)  # what is wrong with it is said before anything is trained
    with locked(workdir) as lock:
        failed, stopped_by = train_missing(study, settings, only, request.jobs, lock)
        for name, error in failed.items():
            _say(f"{name} failed: {error} (more in {workdir / 'runs' / name / 'train.log'})")
        if stopped_by:
            again = shlex.join(["python", "-m", "genai_jax.study", *argv])
            _say(f"stopped by signal {stopped_by}; this goes on: {again}")
            return 128 + stopped_by
        try:
            print(f"report: {report(study, settings, workdir, failed, argv)}")
        except ConfigError as error:
            _say(f"no report: {error}")
            # With some of the runs alone there need not be enough for one.
            return 1 if failed or request.check or not request.only else 0
        wrong = check(study, workdir) if request.check else []
    for line in wrong:
        _say(f"error: {line}")
    if request.check and not wrong:
        print("every number is as expected.json says")
    return 1 if failed or wrong else 0


def _say(text: str):
    print(text, file=sys.stderr)


if __name__ == "__main__":
    run(main)
