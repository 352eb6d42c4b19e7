"""Who of several processes runs on which cores, and that nobody else works in their folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
from collections.abc import Iterator
from typing import IO

from genai_jax.config import ConfigError


def core_shares(jobs: int) -> list[frozenset[int]]:
    """The cores that this process may use, divided among `jobs` processes, at least one each.

    XLA makes as many threads as it may use cores. Processes that each take all cores are in each
    other's way. Empty sets, for all of them, where a system does not tell.

    Raises:
      ConfigError: there are fewer cores than jobs.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if not cores or jobs == 1:
        return [frozenset(cores)] * jobs
    if jobs > len(cores):
        raise ConfigError(f"--jobs={jobs}: there are {len(cores)} core(s) for them")
    return [frozenset(cores[k::jobs]) for k in range(jobs)]


@contextlib.contextmanager
def affinity(cores: frozenset[int]) -> Iterator[None]:
    """While entered, this thread runs on these cores alone, and so does what it starts."""
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
    """While entered, no other study works in `workdir`.

    The lock is the open file's: processes that inherit it hold the lock as long as they live, so
    that runs that a killed study left behind are not started a second time.

    Raises:
      ConfigError: somebody holds it, or `workdir` cannot be written to.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(workdir / "study.lock", "a")  # noqa: SIM115
    except OSError as error:
        raise ConfigError(f"cannot write to --workdir={workdir}: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"--workdir={workdir} is in use: a study runs there, or runs that one left behind"
            ) from None
        yield file
