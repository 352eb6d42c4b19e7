"""The chips that kernels are compiled for, whether this machine has them or not.

Compiling for a chip that this machine lacks needs the packages of `target_packages.py` on the path
(`make targets`) and no hardware; call `prepare_environment` before jax first asks for a device.
"""

from __future__ import annotations

import functools
import os
import pathlib
from dataclasses import dataclass, field

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec


@dataclass(frozen=True)
class Target:
    """A chip, with the numbers of its maker. Rates are per jax device: a core of a v4, v5p or 7x
    counts as half a chip only where jax sees it as a device."""

    name: str
    device_kind: str  # jax.devices()[0].device_kind
    topology: str  # the smallest slice that the compiler knows
    options: dict = field(default_factory=dict, hash=False)
    cores: int = 1  # tensor cores per device, which share the parallel grid dimensions
    clock_hz: float = 0.0
    bf16_flops: float = 0.0  # per device and second
    hbm_bytes: float = 0.0  # per device and second
    platform: str = "tpu"  # or "gpu"


# Peaks: the makers' pages on each chip (a v4 or v5p chip is one device, a 7x chip two).
TARGETS = {
    t.name: t
    for t in (
        Target(
            "v4", "TPU v4", "v4:2x2x1", {"chip_config_name": "megacore"}, 2, 1.05e9, 275e12, 1.2e12
        ),
        Target("v5e", "TPU v5 lite", "v5e:2x2", {}, 1, 1.5e9, 197e12, 819e9),
        Target("v5p", "TPU v5", "v5p:2x2x1", {}, 2, 1.75e9, 459e12, 2.765e12),
        Target("v6e", "TPU v6 lite", "v6e:2x2", {}, 1, 1.75e9, 918e12, 1.64e12),
        Target("7x", "TPU7x", "tpu7x:2x2x1", {}, 1, 1.9e9, 1153.5e12, 3.69e12),
        Target(
            "h200",
            "NVIDIA H200",
            "h200",
            {"topology": "1x1x1"},
            132,
            1.98e9,
            989e12,
            4.8e12,
            "gpu",
        ),
    )
}


def prepare_environment(libtpu_flags: str = "") -> None:
    """Sets up the compilers to describe chips on a machine without any, and keeps them quiet. Call
    before jax is used."""
    jax.config.update("jax_platforms", "cpu")
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # there is no chip to lock
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    # Without these, libtpu queries the cloud's metadata server and complains.
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_ID", "0")
    # Autotuning would run on the device.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
    if libtpu_flags:
        os.environ["LIBTPU_INIT_ARGS"] = libtpu_flags


@functools.cache
def mesh(name: str) -> Mesh:
    """A mesh of one device of the target `name`. ValueError for an unknown name."""
    if name not in TARGETS:
        raise ValueError(f"target {name!r} is unknown; allowed: {', '.join(TARGETS)}")
    target = TARGETS[name]
    options, platform = dict(target.options), target.platform
    if platform == "gpu":
        platform = "cuda"  # the compiler's name for the platform
        described = pathlib.Path(__file__).parent / "gpu" / f"{name}.txtpb"
        options["target_config"] = described.read_text(encoding="utf-8")
    slice_ = topologies.get_topology_desc(
        platform=platform, topology_name=target.topology, **options
    )
    return Mesh(np.array(slice_.devices[:1]), ("device",))


def compile_for(name: str, function, *arguments):
    """`function` compiled for one device of the target; arguments are shapes (a pytree of
    jax.ShapeDtypeStruct). Returns what `jax.stages.Lowered.compile` returns."""
    here = NamedSharding(mesh(name), PartitionSpec())
    place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here)
    with jax.set_mesh(mesh(name)):
        return jax.jit(function).trace(*jax.tree.map(place, arguments)).lower().compile()
