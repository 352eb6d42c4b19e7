"""Trains the unfinished runs of a study: each in its own process, or all in this one."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import IO, NamedTuple

from genai_jax.config import Config, ConfigError
from genai_jax.scaling.study.cores import affinity, core_shares
from genai_jax.scaling.study.folder import Run
from genai_jax.scaling.study.results import STOPPED, Fate, log_path, write_fate
from genai_jax.scaling.study.table import Display
from genai_jax.training.metrics_log import read_metrics

POLL_SECONDS = 0.2


class Outcome(NamedTuple):
    """How the processes of a study ended."""

    failed: dict[str, str]  # run -> last line of its error
    signal: int  # signal that stopped the study, 0 if none did


def command(run: Run) -> list[str]:
    """The command that trains or resumes a run."""
    flags = [f"--flagfile={run.flagfile}", f"--workdir={run.workdir}"]
    return ["python", "-m", "genai_jax.train", *flags]


def execute(
    runs: Sequence[Run], *, jobs: int, display: Display, lock: IO, may_diverge: bool
) -> Outcome:
    """Trains the runs to completion, `jobs` at a time, those with the most FLOPs first.

    SIGINT, SIGTERM, and SIGHUP are passed on to the processes: at the first signal the runs save a
    checkpoint and exit, and no others start; a second one makes them exit at once. A run that fails
    does not affect the others.

    Args:
      runs: the runs to train.
      jobs: number of processes at a time; each gets an equal share of the CPU cores.
      display: notified of all events.
      lock: a locked file that the processes keep open, and thus locked, for as long as they live.
      may_diverge: whether a loss that is not finite counts as a result instead of a failure.
    """
    waiting = sorted(runs, key=lambda run: run.flops, reverse=True)
    shares = core_shares(jobs)
    processes: list[_Process] = []
    failed: dict[str, str] = {}
    with _Signals() as signals, display:
        while processes or (waiting and not signals.received):
            while waiting and len(processes) < jobs and not signals.received:
                place = min(set(range(jobs)) - {p.place for p in processes})
                processes.append(_Process(waiting.pop(0), place, shares[place], lock))
                display.started(processes[-1].run)
            for number in signals.new():
                display.interrupted(len(processes), signals.count)
                for process in processes:
                    process.send(number)
            for process in [p for p in processes if p.ended()]:
                processes.remove(process)
                fate = process.fate()
                write_fate(process.run, fate)
                if fate.code and not signals.received and not (may_diverge and fate.diverged):
                    failed[process.run.name] = fate.error
                display.ended(process.run, fate)
            display.refresh()
            time.sleep(POLL_SECONDS)
    return Outcome(failed, signals.received)


def execute_here(
    runs: Sequence[Run], *, train: Callable[[Config], object], display: Display, may_diverge: bool
) -> Outcome:
    """Trains the runs one after another in this process, those with the most FLOPs first.

    Args:
      runs: the runs to train.
      train: trains or resumes the run of a configuration; one that returns before its last step was
        interrupted, and ends the study.
      display: notified of all events.
      may_diverge: whether a loss that is not finite counts as a result instead of a failure.
    """
    failed: dict[str, str] = {}
    with display:
        for run in sorted(runs, key=lambda run: run.flops, reverse=True):
            began, began_at = time.monotonic(), _last_step(run)
            display.started(run)
            error = ""
            try:
                train(run.config)
            except ConfigError as problem:
                error = str(problem)
            stopped = not error and _last_step(run) < run.steps
            code = 2 if error else 128 + signal.SIGINT if stopped else 0
            fate = Fate(code, error, time.monotonic() - began, began_at)
            write_fate(run, fate)
            if error and not (may_diverge and fate.diverged):
                failed[run.name] = error
            display.ended(run, fate)
            if stopped:
                return Outcome(failed, signal.SIGINT)
    return Outcome(failed, 0)


def _last_step(run: Run) -> int:
    """The last step that a run has logged, 0 if there is none."""
    rows = read_metrics(run.workdir / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0


class _Process:
    """The process of a run."""

    def __init__(self, run: Run, place: int, cores: frozenset[int], lock: IO):
        """place: index of the process among the `jobs` that run at a time."""
        self.run, self.place = run, place
        self._began = time.monotonic()
        self._began_at = _last_step(run)
        run.workdir.mkdir(parents=True, exist_ok=True)
        self._log_start = log_path(run).stat().st_size if log_path(run).exists() else 0
        with open(log_path(run), "ab") as log, affinity(cores):
            # In a new session, so that Ctrl-C in the terminal reaches only the study, which passes
            # it on once. The process inherits the CPU affinity.
            self._process = subprocess.Popen(
                [sys.executable, *command(run)[1:]],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True, pass_fds=(lock.fileno(),),
            )  # fmt: skip

    def send(self, number: int):
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def ended(self) -> bool:
        return self._process.poll() is not None

    def fate(self) -> Fate:
        code = self._process.returncode
        seconds = time.monotonic() - self._began
        error = "" if code == 0 or code in STOPPED else self._error(code)
        return Fate(code, error, seconds, self._began_at)

    def _error(self, code: int) -> str:
        """The last error line of the process, or else its last line of output."""
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        with open(log_path(self.run), "rb") as log:
            log.seek(self._log_start)
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines()]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return (errors or [line for line in lines if line] or [f"exit code {code}"])[-1]


class _Signals:
    """While entered, collects SIGINT, SIGTERM, and SIGHUP, of which only the first counts.

    Only the main thread can; in others it collects nothing.
    """

    def __init__(self):
        self.received = 0  # the first signal
        self.count = 0
        self._new: list[int] = []
        self._before: dict = {}

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number, _frame):
        if number == signal.SIGHUP and self.received:
            return  # a closing terminal sends it twice
        self.received = self.received or number
        self.count += 1
        # A run exits at once if the same signal comes again.
        self._new.append(number if self.received == signal.SIGHUP else self.received)

    def new(self) -> list[int]:
        """The signals received since the last call."""
        new, self._new = self._new, []
        return new
