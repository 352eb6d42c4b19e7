"""Runs beside each other: the flags in which they differ, their final scores, and their curves.

Only files of the workdirs are read, so that runs of any family, also of an outside one, can be
compared without its code. Matplotlib is imported where a figure is drawn.
"""

import os
import pathlib
from collections.abc import Collection, Sequence
from typing import NamedTuple

from genai_jax.config import ConfigError
from genai_jax.errors import printable
from genai_jax.scaling.report import file_name
from genai_jax.scaling.report_types import Cell, Section, Table
from genai_jax.scaling.study.curves import legend
from genai_jax.training.metrics_log import parse_rows, read_lines, thinned
from genai_jax.training.workdir import read_record, recorded_flags

POINTS = 2000  # of a curve


class LoggedRun(NamedTuple):
    """What a workdir says of its run."""

    name: str
    flags: dict[str, str]
    record: dict  # run.json; empty if there is none
    rows: list[dict]  # of metrics.jsonl, thinned; the last one of each kind is kept

    def last(self, metric: str) -> float | None:
        """The last value of a metric; None if it was never logged."""
        return next((row[metric] for row in reversed(self.rows) if metric in row), None)


def read_runs(workdirs: Sequence[str]) -> list[LoggedRun]:
    """Reads runs; they are named by the parts of their paths that differ.

    Raises:
      ConfigError: a folder without a run, or one that occurs twice.
    """
    names = short_names(workdirs)
    runs = []
    for name, workdir in zip(names, workdirs, strict=True):
        if not os.path.lexists(pathlib.Path(workdir) / "flags.txt"):
            raise ConfigError(
                f"argument {workdir!r} is not the workdir of a run: it has no flags.txt"
            )
        path = pathlib.Path(workdir) / "metrics.jsonl"
        rows = list(parse_rows(thinned(read_lines(path), POINTS), path))
        if not rows:
            raise ConfigError(f"the run in {workdir} has logged no metrics yet")
        record = read_record(workdir, without="its sizes are unknown")
        runs.append(LoggedRun(name, recorded_flags(workdir), record, rows))
    return runs


def short_names(paths: Sequence[str]) -> list[str]:
    """For each path, as few of its last parts as tell them all apart.

    Raises:
      ConfigError: two paths are of the same folder.
    """
    real = [os.path.realpath(path) for path in paths]
    for i, path in enumerate(real):
        if path in real[:i]:
            raise ConfigError(f"{paths[i]} is given twice; name different runs")
    parts = [path.strip(os.sep).split(os.sep) for path in real]
    count = 1
    while len({*(tuple(p[-count:]) for p in parts)}) < len(parts):
        count += 1
    return [printable(os.sep.join(p[-count:])) for p in parts]


def flags_section(runs: Sequence[LoggedRun]) -> Section:
    """The flags in which the runs differ."""
    names = dict.fromkeys(name for run in runs for name in run.flags)
    rows: list[tuple[Cell, ...]] = []
    for name in names:
        values = [run.flags.get(name) for run in runs]
        if len({*values}) > 1:
            rows.append((f"--{name}", *(v if v is None else printable(v) or '""' for v in values)))
    columns = ("flag", *(run.name for run in runs))
    if not rows:
        return Section("Flags", ["All flags are equal."])
    text = "Flags that differ; - where the task of a run does not have the flag."
    return Section("Flags", [text], [Table("flags", columns, rows)])


def scores_section(runs: Sequence[LoggedRun]) -> Section:
    """Sizes, and the last value of each metric."""
    rows: list[tuple[Cell, ...]] = [
        ("steps", *(run.rows[-1]["step"] for run in runs)),
        ("parameters", *(run.record.get("parameters", {}).get("total") for run in runs)),
        ("FLOPs per step", *(run.record.get("flops_per_step") for run in runs)),
    ]
    logged = {name for run in runs for row in run.rows for name in row} - {"step"}
    names = sorted((name for name in logged if not of_member(name, logged)), key=_order)
    rows += [(name, *(run.last(name) for run in runs)) for name in names]
    rows = [row for row in rows if any(cell is not None for cell in row[1:])]
    numbers = {
        f"{run.name}/{name}": value
        for name in names
        for run in runs
        if (value := run.last(name)) is not None
    }
    text = "The last value of each metric, as logged during training."
    columns = ("", *(run.name for run in runs))
    return Section("Scores", [text], [Table("scores", columns, rows)], {}, numbers)


def of_member(metric: str, metrics: Collection[str]) -> bool:
    """Whether it is of one member of a population; the mean is named without its number."""
    name, _, member = metric.rpartition("/")
    return member.isdecimal() and name in metrics


def _order(metric: str) -> tuple:
    """Scores first, speed last."""
    kinds = ("eval/", "train/")
    return next((i for i, kind in enumerate(kinds) if metric.startswith(kind)), 2), metric


def curves_section(runs: Sequence[LoggedRun], metrics: Sequence[str], over: str) -> Section:
    """One figure for each metric.

    Args:
      runs: at least one.
      metrics: if empty, those of ``train/loss`` and ``eval/`` that all runs have and that change.
      over: the horizontal axis: "step" or "flops".

    Raises:
      ConfigError: a metric that no run has, or FLOPs that a run does not know.
    """
    has = [{name for row in run.rows for name in row} for run in runs]
    for metric in metrics:
        if not any(metric in names for names in has):
            known = sorted(set.union(*has) - {"step"})
            raise ConfigError(f"--metrics: no run has {metric}; the metrics are {', '.join(known)}")
    if not metrics:
        shared = set.intersection(*has)
        metrics = sorted(
            name
            for name in shared
            if (name == "train/loss" or name.startswith("eval/"))
            and not of_member(name, shared)
            and any(len({row[name] for row in run.rows if name in row}) > 1 for run in runs)
        )
    figures = {file_name(metric): _figure(runs, metric, over) for metric in metrics}
    text = "As logged during training." if figures else "The runs share no metric that changes."
    return Section("Curves", [text], [], figures)


def _figure(runs: Sequence[LoggedRun], metric: str, over: str):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        scale = 1 if over == "step" else run.record.get("flops_per_step")
        if not scale:
            raise ConfigError(f"--over=flops: the run {run.name} does not know its FLOPs per step")
        points = [(row["step"] * scale, row[metric]) for row in run.rows if metric in row]
        if points:
            marker = "o" if len(points) < 15 else None
            axes.plot(*zip(*points, strict=True), label=run.name, marker=marker, ms=4, lw=1.3)
    axes.set(xlabel={"step": "step", "flops": "training compute (FLOPs)"}[over], ylabel=metric)
    axes.grid(alpha=0.3)
    legend(figure, axes, len(axes.lines))
    return figure
