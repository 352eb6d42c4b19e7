"""Tables of all runs of a study: planned ones on the terminal, finished ones in the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from genai_jax.scaling.report_page import shown
from genai_jax.scaling.report_types import Section, Table
from genai_jax.scaling.study.folder import Run, by_number
from genai_jax.scaling.study.groups import learning_rate, seed
from genai_jax.scaling.study.results import Result, read_fate
from genai_jax.scaling.study.table import duration
from genai_jax.scaling.study.times import Speed, makespan
from genai_jax.training.metrics_log import read_metrics

if TYPE_CHECKING:
    from genai_jax.scaling.study.session import State


class Plan(NamedTuple):
    """What a study would train."""

    runs: list[Run]  # now
    finished: list[Run]
    following: list[Run]  # after `runs`, if their results ask for as much as they can
    exact: bool  # whether all results that they can have ask for as many FLOPs
    perhaps: list[Run]  # all that can follow
    others: list[Run]  # not selected, or needed whatever the results

    @classmethod
    def of(cls, every: Sequence[Run], state: State, only: Sequence[str]) -> Plan:
        """The plan of a study in `state` whose runs `only` may be trained."""
        runs = [r for r in state.missing if r.name in only]
        finished = [r for r in state.needed if r.name in state.results]
        known = {r.name for r in (*state.missing, *finished)}
        free = lambda runs: [r for r in runs if r.name in only and r.name not in known]
        following, perhaps, exact = [], [], True
        for choice in state.choices:
            alternatives = [free(alternative) for alternative in choice]
            work = [sum(r.flops for r in alternative) for alternative in alternatives]
            following += alternatives[work.index(max(work))]
            exact = exact and min(work) > 0.99 * max(work)
            perhaps += [r for alternative in alternatives for r in alternative]
        others = [r for r in every if r not in (*runs, *finished, *perhaps)]
        return cls(runs, finished, following, exact, perhaps, others)


def plan_text(plan: Plan) -> str:
    """The table of a dry run."""
    states = {run.name: "finished" for run in plan.finished}
    states |= {run.name: "perhaps later" for run in plan.perhaps}
    states |= {run.name: "not selected" for run in plan.others}
    every = (*plan.runs, *plan.finished, *plan.perhaps, *plan.others)
    every = sorted(every, key=lambda run: by_number(run.name))
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
    now, later = (sum(run.flops for run in runs) for runs in (plan.runs, plan.following))
    lines.append(
        f"{len(plan.runs)} run(s) to train, {now:.3e} FLOPs" if plan.runs else "nothing to train"
    )
    if plan.following:
        lines.append(
            f"then {_at_most(plan)}{len(plan.following)} run(s) that their results choose, "
            f"{later:.3e} FLOPs; in total {_at_most(plan)}{now + later:.3e} FLOPs"
        )
    if plan.others:
        lines.append(f"{len(plan.others)} other run(s) are not selected")
    return "\n".join(lines)


def _at_most(plan: Plan) -> str:
    return "" if plan.exact else "at most "


def times_text(plan: Plan, speed: Speed, jobs: int) -> str:
    """How long a dry run expects the runs to take, `jobs` at a time, and those that follow."""
    span = lambda runs: makespan([speed.seconds(run) for run in runs], jobs)
    rows = [(run.name, duration(speed.seconds(run)), "") for run in plan.runs]
    at_once = f", {jobs} at a time" if jobs > 1 else ""
    now, later = span(plan.runs), span(plan.following)
    lines = [
        *_aligned([("run", "expected time", ""), *rows]),
        f"expected {duration(now)} for {len(plan.runs)} run(s){at_once}",
    ]
    if plan.following:
        lines[-1] += (
            f", then {_at_most(plan)}{duration(later)} for the {len(plan.following)} that their "
            f"results choose: {_at_most(plan)}{duration(now + later)} in total"
        )
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
