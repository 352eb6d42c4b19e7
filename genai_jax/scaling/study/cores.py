"""Divides the CPU cores among processes, and locks a study's workdir."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
from collections.abc import Iterator
from typing import IO

from genai_jax.config import ConfigError


def core_shares(jobs: int) -> list[frozenset[int]]:
    """The cores available to this process, divided among `jobs` processes, at least one each.

    XLA starts one thread per available core, so processes that all use every core slow each other
    down. The sets are empty on systems that do not report the available cores.

    Raises:
      ConfigError: there are fewer cores than jobs.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if not cores or jobs == 1:
        return [frozenset(cores)] * jobs
    if jobs > len(cores):
        raise ConfigError(f"--jobs={jobs}: only {len(cores)} CPU core(s) are available")
    return [frozenset(cores[k::jobs]) for k in range(jobs)]


@contextlib.contextmanager
def affinity(cores: frozenset[int]) -> Iterator[None]:
    """While entered, this thread and the processes that it starts run on these cores only."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[IO]:
    """While entered, no other study can run in `workdir`.

    The lock belongs to the open file: child processes that inherit it hold the lock for as long as
    they live, so that runs which outlive a killed study are not started a second time.

    Raises:
      ConfigError: another process holds the lock, or `workdir` cannot be written to.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        # Opened for reading as well, so that a pipe that lies there does not make us wait.
        descriptor = os.open(workdir / "study.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        file = os.fdopen(descriptor, "rb")
    except OSError as error:
        raise ConfigError(f"cannot write {workdir / 'study.lock'}: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"--workdir={workdir} is in use by another study, or by runs that outlived one"
            ) from None
        yield file
