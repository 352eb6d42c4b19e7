"""Prints the packages with which this jax compiles for a TPU and an NVIDIA GPU that are not here.

They are installed into a folder of their own (`make targets`), which only processes that compile
for such a target have on their PYTHONPATH: installed beside jax they would have every other process
look for the hardware.
"""

from __future__ import annotations

import re
from importlib.metadata import requires, version

CUDA_COMPILER = (
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
)


def packages() -> tuple[str, ...]:
    """Requirements for pip, none of which needs another of its own."""
    libtpu = next(r for r in map(_name_and_version, requires("jax")) if r.startswith("libtpu"))
    plugins = (f"{name}=={version('jax')}" for name in ("jax-cuda13-plugin", "jax-cuda13-pjrt"))
    return (libtpu, *plugins, *CUDA_COMPILER)


def _name_and_version(requirement: str) -> str:
    return re.split(r"\s*;", requirement)[0]


if __name__ == "__main__":
    print(*packages())
