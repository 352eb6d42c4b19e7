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
    """Published peaks of one jax device (a v4 or v5p chip is one device, a v3 or 7x chip two)."""

    name: str
    flops: float  # dense bfloat16 FLOP/s, and float16 where the chip has it
    hbm: float  # memory bandwidth, bytes/s
    memory: float  # bytes available to a program
    clock: float  # Hz; 0: the compiler's cycle estimates are not used
    link: float  # bytes/s over one link to a neighbor, in one direction
    ring: int  # a dimension whose size is a multiple of this wraps around to a ring
    network: float  # bytes/s of one device to devices that no link reaches
    switched: int = 0  # devices per host that a switch connects at `link`; 0: links form a torus
    float32: float = 1.0  # rate of float32 matmuls at jax's default precision, relative to `flops`
    devices: int = 1  # jax devices per chip

    def peak(self, dtype: str) -> float:
        """FLOP/s of matmuls in `dtype`, as ``--dtype`` names it."""
        return self.flops * (self.float32 if dtype == "float32" else 1.0)


# Links: "bidirectional inter-chip interconnect bandwidth per chip" from the system architecture
# pages of Google Cloud's TPU documentation, divided by the ports of a chip (4 or 6) and by both
# directions: 600 (v4), 400 (v5e), 1200 (v5p), 800 (v6e), 1200 GB/s (7x, whose two devices share the
# links of a chip). Network: DCN bandwidth, same pages: 50 Gbit/s per chip (v5p; assumed for v4),
# 6.4 and 25.6 Tbit/s per pod of 256 (v5e, v6e), 100 Gbit/s (7x). H200: NVLink 900 GB/s and 400
# Gbit/s InfiniBand per GPU, from NVIDIA's data sheets of H200 and DGX H200. Memory: what the
# compiler reports as available (libtpu 0.0.42); for NVIDIA, the three quarters of the GPU's memory
# that jax preallocates by default. float32: on NVIDIA, jax's default precision is TF32, which has
# half the rate of bfloat16 (data sheets); on TPU it is one pass in bfloat16.
_MORE = {
    "v4": (30.75 * GIB, 50e9, 4, 6.25e9),
    "v5e": (15.75 * GIB, 50e9, 16, 3.125e9),
    "v5p": (95.74 * GIB, 100e9, 4, 6.25e9),
    "v6e": (31.25 * GIB, 100e9, 16, 12.5e9),
    "7x": (94.75 * GIB, 50e9, 4, 6.25e9, 0, 1.0, 2),
    "h200": (0.75 * 141e9, 450e9, 1, 50e9, 8, 0.5),
}
# Chips without tuned kernels here (`kernels_pallas/targets.py` has the rates of the others).
_OTHERS = (
    # Cloud TPU documentation, "TPU v3": per chip of two devices 123 TFLOP/s, 32 GiB and 900 GB/s;
    # a 2D torus of 1,024 chips with an all-reduce bandwidth of 340 TB/s, which is 83 GB/s for each
    # of four links. Network: assumed, as for v4. No clock: the rate is taken at its peak.
    Chip("v3", 61.5e12, 450e9, 16 * GIB, 0.0, 83e9, 32, 3.125e9, devices=2),
    # NVIDIA A100 data sheet, SXM: 312 TFLOP/s (TF32 156), 1,555 and 2,039 GB/s, NVLink 600 GB/s;
    # DGX A100 data sheet: eight GPUs and eight 200 Gbit/s ports per host.
    Chip("a100_40", 312e12, 1555e9, 0.75 * 40e9, 0.0, 300e9, 1, 25e9, 8, 0.5),
    Chip("a100_80", 312e12, 2039e9, 0.75 * 80e9, 0.0, 300e9, 1, 25e9, 8, 0.5),
    # NVIDIA H100 data sheet, SXM: 989 TFLOP/s without sparsity (TF32 495), 3.35 TB/s, NVLink
    # 900 GB/s; DGX H100 data sheet: eight GPUs and eight 400 Gbit/s ports per host.
    Chip("h100", 989e12, 3.35e12, 0.75 * 80e9, 0.0, 450e9, 1, 50e9, 8, 0.5),
    # NVIDIA DGX B200 data sheet, an eighth of a host: 2.25 PFLOP/s without sparsity (half of the
    # 4.5 with), 180 GB, 8 TB/s, NVLink 1.8 TB/s, and a 400 Gbit/s port.
    Chip("b200", 2250e12, 8e12, 0.75 * 180e9, 0.0, 900e9, 1, 50e9, 8, 0.5),
)
CHIPS = {
    name: Chip(name, t.bf16_flops, t.hbm_bytes, memory, t.clock_hz, *more)
    for name, (memory, *more) in _MORE.items()
    for t in (kernels_pallas.targets.TARGETS[name],)
} | {chip.name: chip for chip in _OTHERS}
EXAMPLES = (
    "v3:4x4, v4:4x4x4, v5e:16x16, v5p:8x8x8, v6e:16x16, 7x:4x4x4, a100_80:1x32x8, h100:1x32x8, "
    "h200:1x32x8, b200:1x32x8, cpu:8"
)
# Compute capability and what else the compiler is given of a GPU, where it differs from the H200:
# NVIDIA's white papers of the A100 and H100, and table "Technical specifications per compute
# capability" of the CUDA programming guide.
_A100 = {
    "shared_memory_per_core": "167936",
    "shared_memory_per_block_optin": "166912",
    "core_count": "108",
    "fpus_per_core": "64",
    "l2_cache_size": "41943040",
    "clock_rate_ghz": "1.41",
    "cuda_compute_capability": "{ major: 8 }",
    "platform_version": '"Compute Capability 8.0"',
}
_GPUS = {
    "h200": {},
    "h100": {"name": '"NVIDIA H100 80GB HBM3"', "device_memory_size": "84942979072"},
    "a100_40": _A100 | {"name": '"NVIDIA A100-SXM4-40GB"', "device_memory_size": "42331013120"},
    "a100_80": _A100 | {"name": '"NVIDIA A100-SXM4-80GB"', "device_memory_size": "85100068864"},
}


def gpu_description(kind: str) -> str:
    """What the compiler is given of a GPU (a text proto), one of `_GPUS`."""
    file = pathlib.Path(kernels_pallas.__file__).parent / "gpu" / "h200.txtpb"
    text, changes = file.read_text(encoding="utf-8"), _GPUS[kind]
    if changes:
        changes = changes | {
            "device_description_str": changes["name"],
            "memory_bandwidth": f"{CHIPS[kind].hbm:.0f}",
        }
    for name, value in changes.items():
        text, count = re.subn(rf"^( *{name}):? .*$", rf"\1: {value}", text, flags=re.MULTILINE)
        assert count == 1, name
    return text


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
        if self.slices > 1 and (self.chip is None or self.chip.switched):
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
        return self.num_chips * (self.chip.devices if self.chip else 1)

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def compiler(self) -> str | None:
        """The package that compiles for these devices; None if jax does so itself."""
        if self.chip is None:
            return None
        return "jax_cuda13_plugin" if self.chip.switched else "libtpu"

    @property
    def described(self) -> bool:
        """Whether the compiler can be given a description of this chip."""
        return self.chip is None or not self.chip.switched or self.kind in _GPUS

    def prepare(self, compiles: bool = True):
        """Prepares this process for describing the devices; call it before jax is used.

        Args:
          compiles: whether something will be compiled. If not, `devices` simulates the devices,
            all in one slice, where the compiler is not installed.

        Raises:
          ConfigError: the compiler is not installed, or cannot compile for this chip.
        """
        if compiles and not self.described:
            raise ConfigError(
                f"--topology={self.text}: the compiler has no description of {self.kind}; "
                "--compiles=false estimates the cost without it"
            )
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
        if not self.compiler or not self.described:
            return True
        return not (compiles or importlib.util.find_spec(self.compiler))

    def devices(self, compiles: bool = True) -> list:
        """The described devices; see `prepare`.

        Raises:
          ConfigError: the compiler does not support this topology.
        """
        if self._simulated(compiles):
            return jax.devices()
        sizes, options = "x".join(map(str, self.shape)), {}
        if self.chip.switched:
            options |= dict(target_config=gpu_description(self.kind), topology=sizes)
            arguments = ("cuda", self.kind)
        else:
            target = kernels_pallas.targets.TARGETS.get(self.kind)
            name = target.topology.split(":")[0] if target else self.kind
            options |= target.options if target else {}
            sizes += "x1" * (3 - len(self.shape)) if self.kind in ("v4", "v5p", "7x") else ""
            arguments = ("tpu", f"{name}:{sizes}")
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
