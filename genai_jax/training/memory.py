"""Whether what a run keeps fits into memory, before anything is allocated."""

import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from genai_jax.config import ConfigError
from genai_jax.files import read_text
from genai_jax.tasks.protocol import ArraySpec
from genai_jax.training.sharding import batch_shards


def check_batch_fits(specs: Mapping[str, ArraySpec], mesh: Mesh):
    """Refuses a global batch that no memory holds; see `_check`."""
    whole = sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in specs.values())
    _check("batch", whole // batch_shards(mesh), mesh)


def check_state_fits(shapes: Any, mesh: Mesh):
    """Refuses a state, `jax.ShapeDtypeStruct`s with shardings, that no memory holds."""
    shard = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    needed = sum(map(shard, jax.tree.leaves(shapes)))
    _check("state (parameters, optimizer, averages)", needed, mesh)


def _check(what: str, needed: int, mesh: Mesh):
    """Raises `ConfigError` if a device has less than the `needed` bytes."""
    limit = min(filter(None, map(_bytes_of, mesh.local_devices)), default=None)
    if limit and needed > limit:
        raise ConfigError(
            f"the {what} of this run needs {_gib(needed)} on each device, which has "
            f"{_gib(limit)}: choose smaller sizes, or split it over more devices"
        )


def _bytes_of(device: jax.Device) -> int | None:
    """The memory of a device; simulated devices share that of the machine. None if unknown."""
    if device.platform == "cpu":
        return _machine_bytes() // jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit")


def _machine_bytes() -> int:
    """The physical memory, or less if a container limits it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = pathlib.Path("/sys/fs/cgroup/memory.max")
    text = read_text(limit).strip() if limit.is_file() else ""
    return min(total, int(text)) if text.isdigit() else total


def _gib(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB"
