"""What the files of a workdir say of a run: sizes, data, compute, time, and scores.

Nothing of the family is imported, so that runs of outside families can be described without their
code. Everything read here is of unknown origin: a fact of another type than a run writes counts as
unknown.
"""

import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from genai_jax.config import ConfigError
from genai_jax.files import read_object
from genai_jax.scaling.run_comparison import POINTS, of_member
from genai_jax.training.metrics_log import parse_rows, read_lines, thinned
from genai_jax.training.portable import FOLDER, MOST_DEEP, RUNS
from genai_jax.training.workdir import flags_path, read_record, recorded_flags, saved_steps


class EarlierRun(NamedTuple):
    """A run that another one builds on: an autoencoder, a teacher, where it started from.

    Attributes:
      flag: that names it.
      task: what it learned.
      flops: of its whole training as its flags plan it; None if that is not known.
    """

    flag: str
    task: str
    flops: float | None


class RunFacts(NamedTuple):
    """A trained run.

    Attributes:
      flags: flag name -> value as text.
      record: ``run.json``; empty if there is none.
      step: the newest checkpoint's, or else the last one logged.
      seconds: spent in training up to there, over all its processes' restarts; None if not known.
      scores: the last held-out metrics of the training, with their prefix; of a population, the
        means over its members.
      earlier: the runs it builds on, and those that they build on.
    """

    flags: dict[str, str]
    record: dict[str, Any]
    step: int
    seconds: float | None
    scores: dict[str, float]
    earlier: list[EarlierRun]

    def get(self, path: str, kind: type | tuple[type, ...]) -> Any:
        """An entry of the record such as ``parameters.total``; None if it is not of this type."""
        return _entry(self.record, path, kind)

    def number(self, path: str) -> float | None:
        value = self.get(path, (int, float))
        return None if isinstance(value, bool) else value

    @property
    def flops(self) -> float | None:
        """Of the whole training, of this run alone; None if its FLOPs per step are not known."""
        per_step = self.number("flops_per_step")
        return None if per_step is None else float(per_step) * self.step

    @property
    def device_hours(self) -> float | None:
        """Simulated CPU devices share a machine, and count as one device per process."""
        devices = "processes" if self.record.get("platform") == "cpu" else "devices"
        count = self.number(devices)
        return None if count is None or self.seconds is None else count * self.seconds / 3600


def read_facts(workdir: str) -> RunFacts:
    """Reads a run.

    Raises:
      ConfigError: there is no run, it has no checkpoint and no metrics, or a file cannot be read.
    """
    flags_path(workdir)
    folder = pathlib.Path(workdir)
    flags, record = recorded_flags(folder), read_record(folder, without="its sizes are unknown")
    path = folder / "metrics.jsonl"
    rows = list(parse_rows(thinned(read_lines(path), POINTS), path))
    steps = saved_steps(folder)
    if not (steps or rows):
        raise ConfigError(f"the run in --workdir={workdir} has no checkpoint and no metrics yet")
    step = max(steps) if steps else rows[-1]["step"]
    scores = {
        name: value
        for row in rows
        if row["step"] <= step
        for name, value in row.items()
        if name.startswith("eval/")
    }
    scores = {name: x for name, x in scores.items() if not of_member(name, scores)}
    seconds = _clock(folder / "checkpoints" / str(step)) if steps else None
    earlier = list(_earlier(folder, flags, MOST_DEEP, {folder.resolve()}))
    return RunFacts(flags, record, step, seconds, scores, earlier)


def _clock(checkpoint: pathlib.Path) -> float | None:
    """Seconds of training until a checkpoint, as it says."""
    try:
        clock = read_object(checkpoint / "clock" / "metadata")
    except ConfigError:
        return None
    seconds = _entry(clock, "seconds", (int, float))
    return float(seconds) if seconds is not None and 0 <= seconds < 1e12 else None


def _earlier(
    folder: pathlib.Path, flags: Mapping[str, str], depth: int, seen: set[pathlib.Path]
) -> Iterator[EarlierRun]:
    """The runs that a run builds on, and theirs, to a depth below which they are unknown.

    Args:
      folder: of the run, with what it kept of those that it builds on.
      flags: of the run.
      depth: how far to go.
      seen: folders of runs that are counted already; those met are added.
    """
    others = []
    runs = folder / FOLDER / RUNS
    if runs.is_dir() and not runs.is_symlink():
        others = [(entry.name, entry) for entry in sorted(runs.iterdir())[:MOST_DEEP]]
    if start := flags.get("init_from"):  # not kept: its parameters are in the checkpoints
        other = pathlib.Path(start)
        if not os.path.lexists(other / "flags.txt"):  # WORKDIR:STEP
            other = pathlib.Path(start.rpartition(":")[0] or start)
        others.append(("init_from", other))
    for flag, other in others:
        if other.resolve() in seen:
            continue
        if not depth:
            yield EarlierRun(flag, "", None)
            continue
        seen.add(other.resolve())
        theirs = _flags(other)
        yield _described(other, flag, theirs)
        yield from _earlier(other, theirs, depth - 1, seen)


def _flags(folder: pathlib.Path) -> dict[str, str]:
    try:
        return recorded_flags(folder)
    except ConfigError:
        return {}


def _described(folder: pathlib.Path, flag: str, flags: Mapping[str, str]) -> EarlierRun:
    try:
        record = read_object(folder / "run.json")
        per_step = _entry(record, "flops_per_step", (int, float))
        flops = float(per_step) * int(flags["train.steps"])
        return EarlierRun(flag, flags.get("task", ""), flops)
    except (ConfigError, KeyError, TypeError, ValueError):
        return EarlierRun(flag, "", None)


def _entry(record: Mapping[str, Any], path: str, kind: type | tuple[type, ...]) -> Any:
    value: Any = record
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, kind) else None
