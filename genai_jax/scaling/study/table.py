"""Progress display of a study: a live table in a terminal, otherwise a line per event."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table

from genai_jax.config import ConfigError
from genai_jax.files import open_regular, parse_json
from genai_jax.scaling.study.folder import Run
from genai_jax.scaling.study.results import STOPPED, Fate

TAIL_BYTES = 1 << 16  # more than a row of metrics.jsonl takes


class Display(Protocol):
    """Notified of what happens to the runs; a context manager around all training."""

    def __enter__(self): ...

    def __exit__(self, *_): ...

    def started(self, run: Run): ...

    def ended(self, run: Run, fate: Fate): ...

    def interrupted(self, running: int, count: int): ...

    def refresh(self): ...


def make_display(runs: Sequence[Run], finished: Sequence[Run], metric: str) -> Display:
    """A table if stderr is a terminal, else lines."""
    if sys.stderr.isatty():
        return LiveTable(runs, finished, metric)
    return Lines(len(runs), len(finished), metric)


class Lines:
    """A line on stderr for every event."""

    def __init__(self, total: int, finished: int, metric: str):
        self._total, self._done, self._metric = total, finished, metric

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def started(self, run: Run):
        row = last_row(run)
        text = f"resumed at step {row['step']}" if row else "started"
        self._say(f"{run.name}: {text}, {run.steps} steps")

    def ended(self, run: Run, fate: Fate):
        self._done += fate.code not in STOPPED
        self._say(f"{run.name}: {_end(run, fate, self._metric)}")

    def interrupted(self, running: int, count: int):
        self._say(interruption(running, count))

    def refresh(self):
        pass

    def _say(self, text: str):
        print(f"[{self._done}/{self._total}] {text}", file=sys.stderr, flush=True)


class LiveTable:
    """A table of all runs, refreshed every half second."""

    def __init__(self, runs: Sequence[Run], finished: Sequence[Run], metric: str, console=None):
        self._runs, self._metric, self._notice = runs, metric, ""
        self._states = {run.name: "waiting" for run in runs} | {r.name: "done" for r in finished}
        self._began: dict[str, float] = {}
        self._seconds: dict[str, float] = {}
        self._first_step: dict[str, int] = {}
        self._console = console or Console(stderr=True)
        self._live = Live(get_renderable=self.table, console=self._console, refresh_per_second=2)

    def __enter__(self):
        self._live.start()
        return self

    def __exit__(self, *_):
        self._live.stop()

    def started(self, run: Run):
        self._states[run.name] = "running"
        self._began[run.name] = time.monotonic()
        self._first_step[run.name] = (last_row(run) or {"step": 0})["step"]

    def ended(self, run: Run, fate: Fate):
        self._states[run.name] = _end(run, fate, self._metric) if fate.code else "done"
        self._seconds[run.name] = time.monotonic() - self._began.pop(run.name)

    def interrupted(self, running: int, count: int):
        self._notice = interruption(running, count)

    def refresh(self):
        pass  # rich refreshes the table

    def table(self) -> Table:
        """The current table as a rich renderable."""
        table = Table(box=None, pad_edge=False, caption=self._notice, caption_justify="left")
        table.add_column("run", no_wrap=True)
        for name in ("step", self._metric, "tokens/s", "time"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("state", overflow="ellipsis", no_wrap=True)
        for run in self._shown():
            table.add_row(*self._row(run), style=self._style(run))
        counts = {s: list(self._states.values()).count(s) for s in ("done", "running", "waiting")}
        table.title = ", ".join(f"{n} {s}" for s, n in counts.items()) + f" of {len(self._runs)}"
        return table

    def _shown(self) -> list[Run]:
        """The runs that fit into the terminal: running ones first, then waiting ones."""
        most = max(self._console.height - 5, 3)
        order = lambda run: ("running", "waiting", "done").index(self._kind(run))
        chosen = sorted(self._runs, key=order)[:most] if len(self._runs) > most else self._runs
        return [run for run in self._runs if run in chosen]

    def _kind(self, run: Run) -> str:
        state = self._states[run.name]
        return state if state in ("running", "waiting", "done") else "running"  # failed: on top too

    def _style(self, run: Run) -> str:
        styles = {"running": "bold", "waiting": "dim", "done": "green"}
        return styles.get(self._states[run.name], "red")

    def _row(self, run: Run) -> tuple[str, ...]:
        row = last_row(run) or {}
        step, score = row.get("step", 0), row.get(self._metric)
        if score is None:
            score = row.get("train/loss")
        rate = row.get("perf/tokens_per_second", row.get("perf/examples_per_second"))
        return (
            run.name,
            f"{step}/{run.steps}",
            "" if score is None else f"{score:.4f}",
            "" if rate is None else f"{rate:,.0f}",
            self._time(run, step),
            self._states[run.name],
        )

    def _time(self, run: Run, step: int) -> str:
        """Elapsed time, and an estimate of the time left."""
        if run.name not in self._began:
            return duration(self._seconds[run.name]) if run.name in self._seconds else ""
        elapsed = time.monotonic() - self._began[run.name]
        done = step - self._first_step[run.name]
        left = f", {duration(elapsed / done * (run.steps - step))} left" if done > 0 else ""
        return duration(elapsed) + left


def last_row(run: Run) -> dict | None:
    """The last complete row of a run's metrics, without reading the rest of the file."""
    path = run.workdir / "metrics.jsonl"
    try:
        with open_regular(path) as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            lines = file.read(TAIL_BYTES).decode(errors="replace").splitlines()
    except (OSError, ConfigError):
        return None
    for line in reversed(lines):
        try:
            row = parse_json(line)
        except ValueError:
            continue
        numbers = isinstance(row, dict) and all(isinstance(v, int | float) for v in row.values())
        return row if numbers and isinstance(row.get("step"), int) else None
    return None


def duration(seconds: float) -> str:
    """A duration as "42 s", "3 min 10 s" or "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def interruption(running: int, count: int) -> str:
    """The message after the `count`-th signal."""
    if count > 1:
        return f"ending {running} run(s) immediately"
    return (
        f"stopping: {running} run(s) save a checkpoint and exit; a second signal ends them "
        "immediately"
    )


def _end(run: Run, fate: Fate, metric: str) -> str:
    """How a run ended."""
    if fate.code in STOPPED:
        return "stopped, checkpoint saved" if fate.code > 0 else "stopped before training began"
    if fate.code:
        return f"{'diverged' if fate.diverged else 'failed'}: {fate.error}"
    row = last_row(run) or {}
    score = f", {metric} {row[metric]:.4f}" if metric in row else ""
    return f"done in {duration(fate.seconds)}{score}"
