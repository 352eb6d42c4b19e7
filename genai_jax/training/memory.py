"""Whether what a run keeps fits into memory, before anything is allocated."""

import math
import os
import pathlib
from typing import Any

import jax

from genai_jax.config import ConfigError


def check_fits(what: str, arrays: Any):
    """Refuses arrays that no memory holds.

    Args:
      what: they are, for the error.
      arrays: a tree of `jax.ShapeDtypeStruct`s with shardings.

    Raises:
      ConfigError: it says what a device would need and what it has.
    """
    leaves = jax.tree.leaves(arrays)
    needed = sum(_bytes_per_device(x) for x in leaves)
    devices = {device for x in leaves for device in x.sharding.addressable_devices}
    limit = min(filter(None, map(_bytes_of, devices)), default=None)
    if limit and needed > limit:
        raise ConfigError(
            f"the {what} of this run needs {_gib(needed)} on each device, which has "
            f"{_gib(limit)}: choose smaller sizes, or split it over more devices"
        )


def _bytes_per_device(x: jax.ShapeDtypeStruct) -> int:
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def _bytes_of(device: jax.Device) -> int | None:
    """The memory of a device; simulated devices share that of the machine. None if unknown."""
    if device.platform == "cpu":
        return _machine_bytes() // jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit")


def _machine_bytes() -> int:
    """The physical memory, or less if a container limits it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = pathlib.Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="ascii").strip() if limit.is_file() else ""
    return min(total, int(text)) if text.isdigit() else total


def _gib(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB"
