"""Matmuls of whole VMEM blocks, tiled so that the sums stay in registers.

On its own, the compiler unrolls the matmul of a large block until it spills. A tile of 128 x 512
sums over 512 products keeps the matrix unit about as busy (its bundles are within 10 % of the
unit's own cycles on v5e) without spills, and in a loop it compiles in seconds for any block.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from .layout import vmem_capacity
from .tile import across, matmul

ROWS, COLUMNS, DEPTH = 128, 512, 512


def add_product(sums, a, b, contract: tuple[int, int], *, keep=None, decay=None):
    """sums += a by b, contracted over one axis of each. All are refs; sums is [rows, columns].

    keep: None, or keep(start, shape, axis) -> bool [shape]: which entries of a tile of a or b,
    whose contracted `axis` begins at `start`, to use. decay: a ref [rows, LANES], all lanes equal,
    by which sums are first multiplied.
    """
    rows, columns = sums.shape
    depth = a.shape[contract[0]]

    step = DEPTH if contract[0] else DEPTH // 2  # a is transposed in registers

    def tile(row, height, column, width, start, length):
        left = _load(a, contract[0], start, length, row, height, keep)
        right = _load(b, contract[1], start, length, column, width, keep)
        at = (pl.ds(row, height), pl.ds(column, width))
        old = sums[at]
        if decay is not None:
            factor = across(decay[pl.ds(row, height)], width)
            old = old * (factor if isinstance(start, int) else jnp.where(start == 0, factor, 1))
        sums[at] = old + matmul(left, right, contract)

    # Masks need registers too; v4, the chip with little VMEM, sums outside the matrix unit.
    narrow = keep is not None or vmem_capacity() < 32 << 20
    loops = ((rows, ROWS), (columns, COLUMNS // 2 if narrow else COLUMNS), (depth, step))
    _nest(loops, tile)


def _load(ref, axis, start, length, other, size, keep):
    """The tile [start, start + length) of the contracted `axis` and [other, other + size) of the
    other axis."""
    index = [pl.ds(other, size)] * 2
    index[axis] = pl.ds(start, length)
    value = ref[tuple(index)]
    if keep is None:
        return value
    # Masked entries may be anything, and 0 times a non-finite number is not 0.
    wide = value.astype(jnp.float32)
    return jnp.where(keep(start, value.shape, axis), wide, 0).astype(value.dtype)


def _nest(loops, body, *outer):
    """Runs body(start, length, ...) for every tile; loops: (size, step) of each dimension."""
    if not loops:
        return body(*outer)
    (size, step), *inner = loops
    whole = size // step
    nested = lambda start, length: _nest(inner, body, *outer, start, length)
    if whole > 1:
        jax.lax.fori_loop(0, whole, lambda i, _: nested(pl.multiple_of(i * step, step), step), None)
    elif whole:
        nested(0, step)
    if size % step:
        nested(whole * step, size % step)


def cost(flops: int, *arrays) -> pl.CostEstimate:
    """The cost of a kernel for the compiler, which does not look into it; the kernel reads or
    writes
    each of `arrays`, which may be shapes, once."""
    touched = sum(a.size * a.dtype.itemsize for a in arrays)
    return pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=touched)
