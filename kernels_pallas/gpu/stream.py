"""The main loop of a matmul on Hopper: one warpgroup loads, the others multiply.

Both operands are streamed from global memory through a ring in shared memory, DEPTH elements of the
contracted dimension per step. Each computing warpgroup owns PART rows of the result; all of them
read the same columns.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .plan import CONSUMERS, matrix

PART = 128  # rows of one computing warpgroup
ROWS = CONSUMERS * PART
COLUMNS = 128
DEPTH = 64


def ring(dtype, stages: int, *, left_transposed=False, right_transposed=False) -> dict:
    """The buffers and barriers of the loop, by name. In each step, the left operand of each
    computing warpgroup is [PART, DEPTH] and the right one [DEPTH, COLUMNS], or transposed."""
    flip = lambda shape, transposed: shape[::-1] if transposed else shape
    left, right = flip((PART, DEPTH), left_transposed), flip((DEPTH, COLUMNS), right_transposed)
    return dict(
        left_ring=matrix((stages, CONSUMERS, *left), dtype),
        right_ring=matrix((stages, *right), dtype),
        ready=plgpu.Barrier(num_arrivals=CONSUMERS + 1, num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
    )


def open_ring(refs: dict):
    """Marks all slots as free; called by each computing warpgroup."""
    for slot in range(refs["right_ring"].shape[0]):
        plgpu.barrier_arrive(refs["free"].at[slot])


def load(refs: dict, step, left, right):
    """Loads step `step`. left(i): the operand of computing warpgroup i; right: the operand that all
    of them read; refs to global memory."""
    slot = _slot(refs, step)
    plgpu.barrier_wait(refs["free"].at[slot])
    ready = refs["ready"].at[slot]
    for i in range(CONSUMERS):
        plgpu.copy_gmem_to_smem(left(i), refs["left_ring"].at[slot, i], ready)
    plgpu.copy_gmem_to_smem(right, refs["right_ring"].at[slot], ready)


def product(refs: dict, me, first, steps, *, left_transposed=False, right_transposed=False):
    """float32 [PART, COLUMNS]: the sum of the products of steps [first, first + steps)."""
    flip = lambda ref, transposed: ref.transpose((1, 0)) if transposed else ref

    def compute(sums):
        def step(i, _):
            slot = _slot(refs, first + i)
            plgpu.barrier_wait(refs["ready"].at[slot])
            left = flip(refs["left_ring"].at[slot, me], left_transposed)
            plgpu.wgmma(sums, left, flip(refs["right_ring"].at[slot], right_transposed))
            plgpu.wgmma_wait(1)  # the previous one is done: its slot is free
            pl.when(i > 0)(
                lambda: plgpu.barrier_arrive(refs["free"].at[_slot(refs, first + i - 1)])
            )

        jax.lax.fori_loop(jnp.int32(0), steps, step, None)
        plgpu.wgmma_wait(0)
        last = first + steps - 1
        pl.when(steps > 0)(lambda: plgpu.barrier_arrive(refs["free"].at[_slot(refs, last)]))
        # No arithmetic on the registers may move ahead of the wait.
        return jax.lax.optimization_barrier(sums[...])

    return pl.run_scoped(compute, plgpu.ACC((PART, COLUMNS), jnp.float32))


def _slot(refs: dict, step):
    return jax.lax.rem(step, jnp.int32(refs["right_ring"].shape[0]))
