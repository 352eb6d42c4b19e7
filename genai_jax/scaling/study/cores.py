"""Divides the CPU cores among processes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

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
