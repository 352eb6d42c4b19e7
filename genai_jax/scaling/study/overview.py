"""Tables of all runs of a study: planned ones on the terminal, finished ones in the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from genai_jax.scaling.report_page import shown
from genai_jax.scaling.report_types import Section, Table
from genai_jax.scaling.study.folder import Run, by_number
from genai_jax.scaling.study.groups import learning_rate, seed
from genai_jax.scaling.study.results import Result, read_fate
from genai_jax.scaling.study.table import duration
from genai_jax.scaling.study.times import Speed, makespan
from genai_jax.training.metrics_log import read_metrics


def plan_text(runs: Sequence[Run], finished: Sequence[Run], others: Sequence[Run]) -> str:
    """The table of a dry run.

    Args:
      runs: runs that would be trained.
      finished: runs that have finished.
      others: runs that are not selected, or that may be needed after `runs` have finished.
    """
    states = {run.name: "finished" for run in finished} | {
        run.name: "perhaps later" for run in others
    }
    every = sorted((*runs, *finished, *others), key=lambda run: by_number(run.name))
    heads = ("run", "parameters", "non-embedding", "tokens", "FLOPs", "")
    rows = [
        (
            run.name + (f" x {run.members}" if run.members > 1 else ""),
            shown(run.counts.parameters),
            shown(run.counts.non_embedding),
            shown(run.counts.tokens_per_step * run.steps * run.members),
            f"{run.flops:.3e}",
            states.get(run.name, ""),
        )
        for run in every
    ]
    lines = [*_aligned([heads, *rows]), f"FLOPs: {every[0].counts.convention}"]
    total = sum(run.flops for run in runs)
    lines.append(f"{len(runs)} run(s) to train, {total:.3e} FLOPs" if runs else "nothing to train")
    if others:
        lines.append(
            f"{len(others)} other run(s) are not selected, or depend on the results of these"
        )
    return "\n".join(lines)


def times_text(runs: Sequence[Run], others: Sequence[Run], speed: Speed, jobs: int) -> str:
    """How long a dry run expects `runs` to take, and `others` if they follow.

    Args:
      runs: runs that would be trained.
      others: see `plan_text`.
      speed: speed of this machine.
      jobs: number of processes at a time.
    """
    together = lambda runs: duration(makespan([speed.seconds(run) for run in runs], jobs))
    rows = [(run.name, duration(speed.seconds(run)), "") for run in runs]
    at_once = f", {jobs} at a time" if jobs > 1 else ""
    lines = [
        *_aligned([("run", "expected time", ""), *rows]),
        f"expected {together(runs)} for {len(runs)} run(s){at_once}",
    ]
    if others:
        lines[-1] += f"; {len(others)} other run(s), if they follow, {together(others)} more"
    lines.append(
        f"estimated from {speed.source}: {speed.rate:.3g} FLOP/s, plus "
        f"{1e3 * speed.overhead:.1f} ms per step and {speed.startup:.0f} s per run"
    )
    return "\n".join(lines)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns: the first and last are left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row):
        middle = [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)]
        return "  ".join([row[0].ljust(widths[0]), *middle, row[-1]]).rstrip()

    return [line(row) for row in rows]


def runs_section(runs: Sequence[Run], results: Mapping[str, list[Result]], metric: str) -> Section:
    """Every model of the finished runs."""
    rows = []
    for run in runs:
        for result in results.get(run.name, []):
            counts = result.counts
            rows.append(
                (
                    result.name, seed(result), learning_rate(result), counts.parameters,
                    counts.non_embedding, result.tokens, result.flops, result.final(metric),
                    *_times(run),
                )
            )  # fmt: skip
    columns = (
        "run", "seed", "learning rate", "parameters", "non-embedding", "tokens or examples",
        "FLOPs", metric, "step time (s)", "wall time (s)",
    )  # fmt: skip
    conventions = dict.fromkeys(run.counts.convention for run in runs)
    text = [
        f"{metric} is the value at the last step; metrics whose names start with eval are measured "
        "on held-out data.",
        *(f"FLOPs: {convention}." for convention in conventions),
        "Times were measured on the machine that trained the run, including the effect of "
        "everything else that ran on it. For a population they cover all members. The wall time is "
        "that of the run's last process.",
    ]
    return Section("Runs", text, [Table("runs", columns, rows)])


def _times(run: Run) -> tuple[float | None, float | None]:
    """(median step time, wall time of the run's last process), in seconds."""
    rows = read_metrics(run.workdir / "metrics.jsonl")
    steps = [row["perf/step_time_s"] for row in rows if "perf/step_time_s" in row]
    fate = read_fate(run)
    return (float(np.median(steps)) if steps else None, round(fate.seconds, 1) if fate else None)
