"""Operations on one tile of scores in the registers of a warpgroup, shared by all kernels.

Tiles are [rows, columns] in the layout of wgmma's accumulator; vectors along either axis are in the
matching layouts. Logits are in base 2 (the hardware's exponential is 2^x): the factor log2(e) is
folded into the scale. Masked logits are -inf; the running maximum starts at LOWEST, which is
finite, so that -inf - -inf never occurs.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..spec import Spec

LOG2_E = math.log2(math.e)
LOWEST = -1e30
TILE = plgpu.Layout.WGMMA
BY_ROW = TILE.reduce(1)
BY_COLUMN = TILE.reduce(0)


class Ids(NamedTuple):
    """Positions of a tile, and its segment ids or None; all of the tile's shape."""

    q: jax.Array
    k: jax.Array
    q_segments: jax.Array | None = None
    k_segments: jax.Array | None = None


def filled(shape: tuple[int, ...], value):
    """float32 [shape] of one value: a tile, or a vector with one number per row."""
    layout = TILE if len(shape) == 2 else BY_ROW
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def load_rows(ref):
    """A vector in shared memory, loaded as one number per row of a tile."""
    return plgpu.layout_cast(ref[...], BY_ROW)


def load_columns(ref):
    """A vector in shared memory, loaded as one number per column of a tile."""
    return plgpu.layout_cast(ref[...], BY_COLUMN)


def across(vector, shape: tuple[int, int]):
    """One number per row -> tile."""
    return jax.lax.broadcast_in_dim(vector, shape, (0,))


def down(vector, shape: tuple[int, int]):
    """One number per column -> tile."""
    return jax.lax.broadcast_in_dim(vector, shape, (1,))


def positions(shape: tuple[int, int], axis: int, start):
    """int32 tile: start + index along `axis`.

    Hidden from the compiler, which would otherwise keep everything that a mask computes from the
    positions in registers during a whole loop. Call it only if needed: it is never optimized away.
    """
    layout = BY_COLUMN if axis else BY_ROW
    along = plgpu.broadcasted_iota(jnp.int32, (shape[axis],), 0, layout=layout) + start
    return jax.lax.broadcast_in_dim(opaque(along), shape, (axis,))


def distance(ids: Ids):
    """|q - k| in float32, which Alibi's slope multiplies."""
    return jnp.abs(ids.q - ids.k).astype(jnp.float32)


def tanh(x):
    """1 - 2 / (1 + e^2x) to float32 precision; the hardware's tanh is only accurate to 5e-4.

    The quotient is the square of a reciprocal root: one instruction, where a division takes a
    dozen.
    """
    root = jax.lax.rsqrt(1 + jnp.exp2(x * (2 * LOG2_E)))
    return 1 - 2 * root * root


def logits(s, ids: Ids | None, spec: Spec, slope):
    """(t, factor, bent) of raw scores s: t * factor are the logits in base 2 before the mask.

    factor > 0 is applied by the exponential at no cost. bent: tanh of the soft cap, or None.
    slope: Alibi's slope of this head times log2(e), or None.
    """
    bent, factor = None, spec.scale * LOG2_E
    if spec.logits_soft_cap is not None:
        bent = tanh(s * (spec.scale / spec.logits_soft_cap))
        s, factor = bent, spec.logits_soft_cap * LOG2_E
    if slope is not None or factor <= 0:
        s, factor = s * factor, 1.0
    if slope is not None:
        s = s - distance(ids) * slope
    return s, factor, bent


def hidden(t, ids: Ids | None, spec: Spec, *, compare: bool, kv_length: int | None):
    """`t` with -inf where the query may not see the key; ids None hides nothing.

    compare: whether to evaluate the mask. kv_length: keys from this index on are padding; None if
    there is no padding.
    """
    if ids is None:
        return t
    visible = []
    if compare:
        visible.append(spec.mask.allowed(ids.q, ids.k))
        if kv_length is not None:
            visible.append(ids.k < kv_length)
    if ids.q_segments is not None:
        visible.append(ids.q_segments == ids.k_segments)
    if not visible:
        return t
    return jnp.where(functools.reduce(jnp.logical_and, visible), t, -jnp.inf)


def product(a, b, meanwhile=lambda: None, onto=None, interpret=None):
    """(a @ b in float32, meanwhile()): the product of two blocks in shared memory, added to the
    tile
    `onto` if given, and the result of `meanwhile`, computed while the product runs."""

    def compute(sums):
        if onto is not None and not interpret:
            sums[...] = onto
        plgpu.wgmma(sums, a, b)
        result = meanwhile()
        return _settled(sums[...]), result

    sums, result = pl.run_scoped(compute, _accumulator(a, b))
    return (sums + onto if onto is not None and interpret else sums), result


def add_product(sums, a, b, then=None, started=lambda: None, interpret=None):
    """(sums + a @ b, c @ d) with `then` = (c, d); without `then`, the second is None.

    sums and a are in registers, everything else in shared memory. The products are started
    immediately after each other, `started()` is called, and both are waited for. The product that
    reads registers must come first, and only one may: registers must not be written while a wgmma
    runs.
    """
    if interpret:
        results = sums + _matmul(a, b), product(*then)[0] if then else None
        started()
        return results

    def compute(sums_ref, then_ref=None):
        sums_ref[...] = sums
        plgpu.wgmma(sums_ref, a, b)
        if then:
            plgpu.wgmma(then_ref, *then)
        started()
        return _settled(sums_ref[...]), _settled(then_ref[...]) if then else None

    return pl.run_scoped(compute, _accumulator(a, b), *([_accumulator(*then)] if then else []))


def _accumulator(a, b):
    return plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32)


def opaque(x):
    """`x`, opaque to the compiler, so that it cannot be moved out of a loop."""
    return jax.lax.optimization_barrier(x)


def _settled(x):
    """`x`, such that no arithmetic on it can move ahead of this point: the registers of a wgmma may
    be read only after waiting for it."""
    return jax.lax.optimization_barrier(x)


def _matmul(a, b):
    """Stands in for a wgmma of registers, which the interpreter does not support."""
    b = b[...]
    plgpu.commit_smem()  # wgmma reads in the async proxy, like TMA; an ordinary read needs a fence
    return jnp.dot(a, b, preferred_element_type=jnp.float32)
