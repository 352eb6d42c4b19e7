"""All runs of a study in a table: as planned on the terminal, as finished in the report."""

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


def plan_text(
    runs: Sequence[Run], finished: Sequence[Run], others: Sequence[Run], speed: Speed | None,
    jobs: int,
) -> str:  # fmt: skip
    """What a dry run prints.

    Args:
      runs: what would be trained.
      finished: what needs no process any more.
      others: what may be needed later, when these are finished.
      speed: of this machine, None if nothing would be trained.
      jobs: processes at a time.
    """
    states = {run.name: "finished" for run in finished} | {
        run.name: "perhaps later" for run in others
    }
    every = sorted((*runs, *finished, *others), key=lambda run: by_number(run.name))
    heads = ("run", "parameters", "non-embedding", "tokens", "FLOPs", "expected time", "")
    rows = [
        (
            run.name + (f" x {run.members}" if run.members > 1 else ""),
            shown(run.counts.parameters),
            shown(run.counts.non_embedding),
            shown(run.counts.tokens_per_step * run.steps * run.members),
            f"{run.flops:.3e}",
            duration(speed.seconds(run)) if speed and run.name not in states else "",
            states.get(run.name, ""),
        )
        for run in every
    ]
    lines = [*_aligned([heads, *rows]), f"FLOPs: {every[0].counts.convention}"]
    if speed:
        seconds = [speed.seconds(run) for run in runs]
        at_once = f", {jobs} at a time" if jobs > 1 else ""
        lines += [
            f"{len(runs)} run(s) to train, {sum(run.flops for run in runs):.3e} FLOPs: expected "
            f"{duration(makespan(seconds, jobs))}{at_once}",
            f"expected from {speed.source}: {speed.rate:.3g} FLOP/s, {1e3 * speed.overhead:.1f} ms "
            f"a step and {speed.startup:.0f} s a run besides",
        ]
    else:
        lines.append("nothing to train")
    if others:
        lines.append(f"{len(others)} other run(s) are not asked for, or follow from what comes out")
    return "\n".join(lines)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with the first and last column to the left, the others to the right."""
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
        f"{metric} is of the last step, on held-out data if its name says eval.",
        *(f"FLOPs: {convention}." for convention in conventions),
        "Times are of this run's machine, with all that ran beside it; a population's are of all "
        "its members, and the wall time is of the run's last process.",
    ]
    return Section("Runs", text, [Table("runs", columns, rows)])


def _times(run: Run) -> tuple[float | None, float | None]:
    """Median seconds of a step, and of the run's last process."""
    rows = read_metrics(run.workdir / "metrics.jsonl")
    steps = [row["perf/step_time_s"] for row in rows if "perf/step_time_s" in row]
    fate = read_fate(run)
    return (float(np.median(steps)) if steps else None, round(fate.seconds, 1) if fate else None)
