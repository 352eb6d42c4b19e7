"""Everything static about one kernel call, and the layout of its arrays in shared memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..spec import Spec
from .schedule import Schedule

CONSUMERS = 2  # warpgroups that compute; a third one loads
MATRIX_ROWS = 64  # rows of one wgmma
SHARED_MEMORY = 227 * 1024  # bytes that a thread block may use
REGISTERS = dict(computing=240, loading=24)  # per thread, out of 504 for the three warpgroups
COMPILER_PARAMS = plgpu.CompilerParams(
    approx_math=True,
    lowering_semantics=plgpu.LoweringSemantics.Lane,
    reduction_scratch_bytes=0,  # each row of a tile is within one warp
)


@dataclass(frozen=True)
class Blocks:
    """Block sizes of a kernel.

    rows: of both consumers together; columns: per step; stages: number of steps whose columns fit
    in shared memory at the same time.
    """

    rows: int
    columns: int
    stages: int

    def __post_init__(self):
        if self.rows % (CONSUMERS * MATRIX_ROWS) or self.rows < 1:
            raise ValueError(f"blocks: rows={self.rows}; allowed: multiples of 128")
        if self.columns % 64 or not 64 <= self.columns <= 256:
            raise ValueError(f"blocks: columns={self.columns}; allowed: multiples of 64 up to 256")
        if self.stages < 1:
            raise ValueError(f"blocks: stages={self.stages}; allowed: 1 or more")

    @property
    def part(self) -> int:
        """Rows of one consumer."""
        return self.rows // CONSUMERS


class Plan(NamedTuple):
    """Everything static about one kernel call."""

    spec: Spec
    blocks: Blocks
    schedule: Schedule
    groups: int
    kv_length: int  # without padding
    k_padded: bool  # whether the last key block extends past kv_length
    interpret: object = None


def matrix(shape: tuple[int, ...], dtype):
    """A matrix in shared memory, tiled and swizzled for wgmma; its last dimension must be a
    multiple
    of 32."""
    bytes_ = 128 if shape[-1] % 64 == 0 else 64
    transforms = (
        plgpu.TilingTransform((8, bytes_ // jnp.dtype(dtype).itemsize)),
        plgpu.SwizzleTransform(bytes_),
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def shared_memory(scratch: dict) -> int:
    """Bytes of shared memory of the buffers and barriers as Mosaic lays them out: each buffer
    starts
    at a multiple of 1024."""
    total = 0
    for item in scratch.values():
        if isinstance(item, plgpu.Barrier):
            total += 8 * int(np.prod(item.num_barriers))
        else:
            size = int(np.prod(item.shape)) * jnp.dtype(item.dtype).itemsize
            total += -(-size // 1024) * 1024
    return total
