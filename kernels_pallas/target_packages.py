"""Prints the packages with which this jax compiles for a TPU and an NVIDIA GPU it does not have.

They are installed into a separate folder (`make targets`), which is on the PYTHONPATH only of
processes that compile for such a target: installed next to jax, they would make every other process
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
    """Requirements for pip, none of which has dependencies that need to be installed."""
    libtpu = next(r for r in map(_name_and_version, requires("jax")) if r.startswith("libtpu"))
    plugins = (f"{name}=={version('jax')}" for name in ("jax-cuda13-plugin", "jax-cuda13-pjrt"))
    return (libtpu, *plugins, *CUDA_COMPILER)


def _name_and_version(requirement: str) -> str:
    return re.split(r"\s*;", requirement)[0]


if __name__ == "__main__":
    print(*packages())
