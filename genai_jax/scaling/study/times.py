"""Estimates how long runs will take."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from genai_jax.config import ConfigError
from genai_jax.scaling.study.cores import affinity, core_shares
from genai_jax.scaling.study.folder import Run
from genai_jax.scaling.study.results import read_fate
from genai_jax.scaling.study.table import last_row
from genai_jax.training.metrics_log import read_metrics

CALIBRATION_STEPS = 8


class Speed(NamedTuple):
    """A run takes startup + steps x (overhead + FLOPs per step / rate) seconds."""

    startup: float
    overhead: float
    rate: float  # FLOP/s
    source: str

    def seconds(self, run: Run) -> float:
        """Expected time for the rest of a run."""
        done = (last_row(run) or {"step": 0})["step"]
        step = self.overhead + run.flops / run.steps / self.rate
        return self.startup + (run.steps - done) * step


class Measured(NamedTuple):
    """Measured times of one run's process."""

    step_flops: float
    step_seconds: float
    startup: float  # everything besides steps: imports, compilation, evaluation, checkpoints


def given(flops_per_second: float) -> Speed:
    return Speed(0.0, 0.0, flops_per_second, f"--flops_per_second={flops_per_second:g}")


def from_finished(runs: Sequence[Run]) -> Speed | None:
    """The speed of the finished runs of the study, None if there are none."""
    times = [m for run in runs if (m := _measured(run)) is not None]
    return _fitted(times, f"{len(times)} finished run(s) of the study") if times else None


def calibrated(runs: Sequence[Run], jobs: int) -> Speed:
    """The speed of a few steps of the cheapest and the most expensive run, on one job's cores.

    Raises:
      ConfigError: one of them fails.
    """
    ordered = sorted(runs, key=lambda run: run.flops / run.steps)
    chosen = list({run.name: run for run in (ordered[0], ordered[-1])}.values())
    with affinity(core_shares(jobs)[0]):
        times = [_calibrate(run) for run in chosen]
    names = " and ".join(run.name for run in chosen)
    return _fitted(
        times, f"{CALIBRATION_STEPS} steps of {names} on this machine under its current load"
    )


def makespan(seconds: Sequence[float], jobs: int) -> float:
    """Seconds until the last run ends, with the longest started first, `jobs` at a time."""
    ends = [0.0] * jobs
    for duration in sorted(seconds, reverse=True):
        ends[ends.index(min(ends))] += duration
    return max(ends)


def _measured(run: Run) -> Measured | None:
    rows = read_metrics(run.workdir / "metrics.jsonl")
    steps = [row["perf/step_time_s"] for row in rows if "perf/step_time_s" in row]
    if not steps:
        return None
    step = float(np.median(steps))
    fate = read_fate(run)
    whole = fate is not None and fate.code == 0 and fate.began_at == 0
    startup = max(fate.seconds - step * run.steps, 0.0) if whole else 0.0
    return Measured(run.flops / run.steps, step, startup)


def _calibrate(run: Run) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        flags = [
            f"--flagfile={run.flagfile}", f"--workdir={folder}", "--train.log_every=1",
            f"--train.steps={CALIBRATION_STEPS}", "--eval.batches=0", "--train.progress=false",
        ]  # fmt: skip
        began = time.monotonic()
        result = subprocess.run(
            [sys.executable, "-m", "genai_jax.train", *flags],
            stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip
        seconds = time.monotonic() - began
        rows = read_metrics(pathlib.Path(folder) / "metrics.jsonl")
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        raise ConfigError(
            f"{run.flagfile}: {lines[-1] if lines else f'exit code {result.returncode}'}"
        )
    # The first step includes compilation, and the second still some of it.
    step = float(np.median([row["perf/step_time_s"] for row in rows][2:]))
    return Measured(run.flops / run.steps, step, max(seconds - CALIBRATION_STEPS * step, 0.0))


def _fitted(times: Sequence[Measured], source: str) -> Speed:
    """Non-negative overhead and rate that minimize the squared relative errors of step times."""
    from scipy.optimize import nnls  # here, so that commands start without SciPy

    flops = np.array([m.step_flops for m in times])
    seconds = np.array([m.step_seconds for m in times])
    startups = [m.startup for m in times if m.startup]
    startup = float(np.median(startups)) if startups else 0.0
    if flops.max() / flops.min() < 1.5:  # too similar to separate overhead from rate
        return Speed(startup, 0.0, float(np.median(flops / seconds)), source)
    scale = float(np.median(flops / seconds))
    columns = np.stack([1 / seconds, flops / scale / seconds], 1)
    (overhead, inverse), _ = nnls(columns, np.ones(len(times)))
    rate = scale / inverse if inverse > 0 else scale
    return Speed(startup, float(overhead), float(rate), source)
