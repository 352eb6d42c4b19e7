"""Chips and topologies that a program can be compiled for without owning them, and their peaks."""

from __future__ import annotations

import importlib.util
import math
import os
import pathlib
import re
from dataclasses import dataclass

import jax
from jax.experimental import topologies

import kernels_pallas.targets
from genai_jax.config import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Published peaks of one jax device (a v4 or v5p chip is one device, a 7x chip two)."""

    name: str
    flops: float  # dense bfloat16 FLOP/s
    hbm: float  # memory bandwidth, bytes/s
    memory: float  # bytes available to a program
    clock: float  # Hz; 0: the compiler's cycle estimates are not used
    link: float  # bytes/s over one link to a neighbor, in one direction
    ring: int  # a dimension whose size is a multiple of this wraps around to a ring
    network: float  # bytes/s of one device to devices that no link reaches
    switched: int = 0  # devices per host that a switch connects at `link`; 0: links form a torus


# Links: "bidirectional inter-chip interconnect bandwidth per chip" from the system architecture
# pages of Google Cloud's TPU documentation, divided by the ports of a chip (4 or 6) and by both
# directions: 600 (v4), 400 (v5e), 1200 (v5p), 800 (v6e), 1200 GB/s (7x, whose two devices share the
# links of a chip). Network: DCN bandwidth, same pages: 50 Gbit/s per chip (v5p; assumed for v4),
# 6.4 and 25.6 Tbit/s per pod of 256 (v5e, v6e), 100 Gbit/s (7x). H200: NVLink 900 GB/s and 400
# Gbit/s InfiniBand per GPU, from NVIDIA's data sheets of H200 and DGX H200. Memory: what the
# compiler reports as available (libtpu 0.0.42); for the H200, the three quarters of its 141 GB that
# jax preallocates by default.
_MORE = {
    "v4": (30.75 * GIB, 50e9, 4, 6.25e9),
    "v5e": (15.75 * GIB, 50e9, 16, 3.125e9),
    "v5p": (95.74 * GIB, 100e9, 4, 6.25e9),
    "v6e": (31.25 * GIB, 100e9, 16, 12.5e9),
    "7x": (94.75 * GIB, 50e9, 4, 6.25e9),
    "h200": (0.75 * 141e9, 450e9, 1, 50e9, 8),
}
CHIPS = {
    name: Chip(name, t.bf16_flops, t.hbm_bytes, memory, t.clock_hz, *more)
    for name, (memory, *more) in _MORE.items()
    for t in (kernels_pallas.targets.TARGETS[name],)
}
EXAMPLES = "v4:4x4x4, v5e:16x16, v5p:8x8x8, v6e:16x16, 7x:4x4x4, h200:1x32x8, cpu:8"


@dataclass(frozen=True)
class Topology:
    """Devices as ``chip:shape``, e.g. ``v5p:8x8x8``; GPUs as slices x hosts x GPUs per host."""

    text: str
    slices: int = 1

    def __post_init__(self):
        if not re.fullmatch(r"\w+:\d+(x\d+){0,2}", self.text) or self.kind not in (*CHIPS, "cpu"):
            raise ConfigError(f"--topology={self.text} is unknown; examples are {EXAMPLES}")
        if 0 in self.shape:
            raise ConfigError(f"--topology={self.text}: sizes must be at least 1")
        if self.kind == "cpu" and len(self.shape) > 1:
            raise ConfigError(f"--topology={self.text}: cpu takes a single size, as cpu:8")
        if self.slices > 1 and self.kind in ("cpu", "h200"):
            raise ConfigError(f"--slices={self.slices} works for TPUs only, not for {self.text}")

    @property
    def kind(self) -> str:
        return self.text.split(":")[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(size) for size in self.text.split(":")[1].split("x"))

    @property
    def chip(self) -> Chip | None:
        """None for simulated CPU devices."""
        return CHIPS.get(self.kind)

    @property
    def num_devices(self) -> int:
        return math.prod(self.shape) * self.slices * (2 if self.kind == "7x" else 1)

    @property
    def compiler(self) -> str | None:
        """The package that compiles for these devices; None if jax does so itself."""
        return {"cpu": None, "h200": "jax_cuda13_plugin"}.get(self.kind, "libtpu")

    def prepare(self, compiles: bool = True):
        """Prepares this process for describing the devices; call it before jax is used.

        Args:
          compiles: whether something will be compiled. If not, `devices` simulates the devices,
            all in one slice, where the compiler is not installed.

        Raises:
          ConfigError: the compiler is not installed.
        """
        if self._simulated(compiles):
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", self.num_devices)
            return
        kernels_pallas.targets.prepare_environment()
        needed = self.compiler
        try:
            __import__(needed)
        except ImportError:
            raise ConfigError(
                f"--topology={self.text} needs {needed}, which is not installed: run `make "
                "targets` and set PYTHONPATH=.venv/targets"
            ) from None

    def _simulated(self, compiles: bool) -> bool:
        return not self.compiler or not (compiles or importlib.util.find_spec(self.compiler))

    def devices(self, compiles: bool = True) -> list:
        """The described devices; see `prepare`.

        Raises:
          ConfigError: the compiler does not support this topology.
        """
        if self._simulated(compiles):
            return jax.devices()
        target = kernels_pallas.targets.TARGETS[self.kind]
        sizes, options = "x".join(map(str, self.shape)), dict(target.options)
        if target.platform == "gpu":
            file = pathlib.Path(kernels_pallas.__file__).parent / "gpu" / f"{self.kind}.txtpb"
            options |= dict(target_config=file.read_text(encoding="utf-8"), topology=sizes)
            arguments = ("cuda", self.kind)
        else:
            sizes += "x1" * (3 - len(self.shape)) if self.kind in ("v4", "v5p", "7x") else ""
            arguments = ("tpu", f"{target.topology.split(':')[0]}:{sizes}")
            if self.slices > 1:
                options["num_slices"] = self.slices
            if self.shape in ((1, 1), (1, 1, 1), (1,)):
                options["chips_per_host_bounds"] = [1, 1, 1]
        try:
            topology = topologies.get_topology_desc(
                platform=arguments[0], topology_name=arguments[1], **options
            )
        except Exception as error:  # the plug-ins raise different types
            reason = str(error).strip().splitlines()[0][:200]
            raise ConfigError(
                f"--topology={self.text}: {reason}; examples are {EXAMPLES}"
            ) from None
        return list(topology.devices)


def machine_memory() -> float:
    """This machine's memory in bytes, which its simulated devices share."""
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
