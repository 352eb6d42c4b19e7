"""Peak FLOP/s of devices: the denominator of MFU."""

import functools
import re
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

# Dense bfloat16 FLOP/s of one JAX device, by a pattern of `device_kind`; the first match counts.
# TPU: "TPU versions" and the system architecture pages of the Google Cloud documentation; a v4 or
# v5p chip is one device, a v3 (123e12) or 7x chip (2307e12) is two. NVIDIA: the SXM column of each
# data sheet.
PEAK_BFLOAT16 = (
    ("TPU v3", 61.5e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5p?", 459e12),
    ("TPU v6", 918e12),
    ("TPU7x?", 1153.5e12),
    ("B200", 2250e12),
    ("H200", 989.4e12),
    ("H100", 989.4e12),
    ("A100", 312e12),
    ("L4", 121e12),
    ("V100", 125e12),
)


class Peak(NamedTuple):
    """FLOP/s of all devices together, and the source of the number."""

    flops_per_second: float
    source: str


def peak_of(devices: list) -> Peak | None:
    """The peak of these devices: published for known chips, measured on CPU, otherwise None."""
    kind = devices[0].device_kind
    if devices[0].platform == "cpu":
        # Simulated devices share the machine, so its rate is the peak of all of them together.
        return Peak(
            measured_matmul_rate(devices[0]),
            "float32 1024x1024x1024 matmul measured on this machine",
        )
    for name, rate in PEAK_BFLOAT16:
        if re.search(rf"\b{name}\b", kind, re.IGNORECASE):
            return Peak(rate * len(devices), f"published dense bfloat16 peak of {kind}")
    return None


def nearest_first(mesh: Mesh) -> list[jax.Device]:
    """The devices of a mesh, those of this process first: others cannot be measured."""
    here = jax.process_index()
    return sorted(mesh.devices.flatten(), key=lambda device: device.process_index != here)


@functools.cache  # it takes a tenth of a second and more
def measured_matmul_rate(device=None, size: int = 1024, repeats: int = 11) -> float:
    """Median float32 FLOP/s of a size x size x size matmul."""
    x = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    multiply = jax.jit(jnp.matmul)
    multiply(x, x).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        multiply(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / float(np.median(seconds))
