"""Reads the workdirs of a study's runs: whether they have finished, and their results."""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
import sys
from typing import NamedTuple

from genai_jax.config import Config, ConfigError
from genai_jax.files import read_object, unreadable, write_text
from genai_jax.flagfiles import flag_values
from genai_jax.scaling.study.folder import Counts, Run
from genai_jax.training.metrics_log import read_metrics
from genai_jax.training.population import member_config
from genai_jax.training.workdir import read_record, recorded_flags

FATE = "study.json"  # file in a run's workdir that says how its last process ended
STOPPED = (129, 130, 143, -1, -2, -15)  # exit codes of a run that SIGHUP, SIGINT or SIGTERM ended
NOT_FINITE = re.compile(r"(loss|grad_norm|penalty)\S* is (nan|-?inf) at step")


class Result(NamedTuple):
    """One trained model: a run, or a member of its population."""

    name: str
    config: Config
    counts: Counts
    rows: list[dict]  # rows of metrics.jsonl with the metrics of this model
    diverged: bool

    @property
    def tokens(self) -> int:
        return self.counts.tokens_per_step * self.config.train.steps

    @property
    def flops(self) -> float:
        return self.counts.flops_per_step * self.config.train.steps

    def final(self, metric: str) -> float:
        """The value of a metric at the last step; infinite if the run diverged.

        Raises:
          ConfigError: the run has no such metric.
        """
        if self.diverged:
            return math.inf
        last = self.rows[-1]
        if metric not in last:
            known = ", ".join(name for name in sorted(last) if name.startswith(("eval/", "train/")))
            raise ConfigError(f"run {self.name} has no metric {metric!r}; its metrics are {known}")
        return last[metric]

    def curve(self, metric: str) -> tuple[list[int], list[float]]:
        """(steps, values) of all rows that have the metric."""
        points = [(row["step"], row[metric]) for row in self.rows if metric in row]
        return [step for step, _ in points], [value for _, value in points]


class Fate(NamedTuple):
    """How the last process of a run ended."""

    code: int
    error: str  # empty if there was none
    seconds: float  # wall time of that process
    began_at: int  # step at which it started or resumed

    @property
    def diverged(self) -> bool:
        return bool(NOT_FINITE.search(self.error))


def write_fate(run: Run, fate: Fate):
    run.workdir.mkdir(parents=True, exist_ok=True)
    write_text(run.workdir / FATE, json.dumps(fate._asdict()) + "\n")


def read_fate(run: Run) -> Fate | None:
    """None if there is none; also, with a warning, if the file cannot be read."""
    path = run.workdir / FATE
    if not os.path.lexists(path):
        return None
    try:
        return _fate(path)
    except ConfigError as error:
        print(f"warning: {error}; how the last process ended is unknown", file=sys.stderr)
        return None


def _fate(path: pathlib.Path) -> Fate:
    saved = read_object(path)
    kinds = {"code": int, "error": str, "seconds": int | float, "began_at": int}
    if saved.keys() != kinds.keys() or not all(isinstance(saved[n], k) for n, k in kinds.items()):
        raise unreadable(path, f"its keys are not those of a run's end: {', '.join(kinds)}")
    return Fate(**saved)


def is_finished(run: Run, may_diverge: bool) -> bool:
    """Whether the run is complete; a divergence also completes it if it `may_diverge`.

    Raises:
      ConfigError: the workdir holds a run with different flags.
    """
    rows = read_metrics(run.workdir / "metrics.jsonl")
    fate = read_fate(run)
    diverged = may_diverge and fate is not None and fate.diverged
    if not diverged and not rows:
        return False
    _refuse_other_flags(run)
    if diverged:
        return True
    last = rows[-1]
    if last["step"] < run.steps:
        return False
    return not run.config.eval.batches or any(name.startswith("eval/") for name in last)


def _refuse_other_flags(run: Run):
    """Raises `ConfigError` if flags that affect the results of a run have changed.

    These include its number of steps, although training could be extended: the learning-rate
    schedule up to now was that of the old length.
    """
    before = recorded_flags(run.workdir)
    now = flag_values(run.config.to_flags(leave_out=("workdir",)))
    free = run.config.changeable() - {"eval.batches", "train.steps"}
    changed = [
        f"--{name}={before[name]} -> {now[name]}"
        for name in before
        if name in now and name not in free and before[name] != now[name]
    ]
    if changed:
        raise ConfigError(
            f"{run.workdir} holds a run with flags different from {run.flagfile}: "
            f"{', '.join(changed)}; use another --workdir, or delete it"
        )


def read_results(run: Run) -> list[Result]:
    """The models of a finished run."""
    rows = read_metrics(run.workdir / "metrics.jsonl")
    fate = read_fate(run)
    gone = not rows or rows[-1]["step"] < run.steps
    diverged = gone and fate is not None and fate.diverged
    if run.members == 1:
        return [Result(run.name, run.config, run.counts, rows, diverged)]
    return [_member(run, k, rows, diverged) for k in range(run.members)]


def _member(run: Run, member: int, rows: list[dict], diverged: bool) -> Result:
    """A member's metrics are named ``<metric>/<member>`` and are missing once it has diverged."""
    end = f"/{member}"
    own = [
        {"step": row["step"]} | {n.removesuffix(end): v for n, v in row.items() if n.endswith(end)}
        for row in rows
    ]
    config = member_config(run.config, member)
    diverged = diverged or len(own[-1]) == 1
    return Result(f"{run.name}/{member}", config, run.counts, own, diverged)


def environments(runs: list[Run]) -> dict:
    """Versions, devices and data from the run.json files; differing values are listed together."""
    fields = ("python", "versions", "git_commit", "platform", "device_kind", "devices", "data")
    records = [read_record(run.workdir, without="the report lacks its versions") for run in runs]
    merged: dict = {}
    for record in records:
        for name in fields:
            _merge(merged, name, record.get(name))
    return merged


def _merge(merged: dict, name: str, value):
    if isinstance(value, dict):
        for key, part in value.items():
            _merge(merged.setdefault(name, {}), key, part)
    elif value is not None:
        before = merged.setdefault(name, str(value))
        if str(value) not in before.split(" | "):
            merged[name] = f"{before} | {value}"


def log_path(run: Run) -> pathlib.Path:
    """The file with the output of the run's processes."""
    return run.workdir / "train.log"
