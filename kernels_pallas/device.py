"""The device to compile for: that of the mesh in use (`jax.set_mesh`), or jax's default device."""

from __future__ import annotations

import jax

# Substrings of the names of GPUs with warpgroup matmuls (compute capability 9.0).
HOPPER = ("H100", "H200", "H800", "H20", "GH200")


def platform() -> str:
    """ "cpu", "gpu" or "tpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def device_kind() -> str:
    """The device kind that jax reports, such as "TPU v5 lite" or "NVIDIA H200"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind
