"""Operations on one tile of scores in VMEM, shared by the forward and the backward kernel.

Logits and log-sum-exps are in base 2 inside the kernels (the hardware's exponential is 2^x): the
factor log2(e) is folded into the scale. Masked logits are -inf; the running maximum starts at
LOWEST, which is finite, so that -inf - -inf never occurs.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..spec import Spec
from .visits import LANES, Run

LOG2_E = math.log2(math.e)
LOWEST = -1e30


class Ids(NamedTuple):
    """Positions of a tile, and its segment ids if any; all broadcast to the tile's shape."""

    q: jax.Array
    k: jax.Array
    q_segments: jax.Array | None = None
    k_segments: jax.Array | None = None


def positions(shape: tuple[int, int], axis: int, start) -> jax.Array:
    """int32 [shape]: start + index along `axis`."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis) + start


def distance(ids: Ids) -> jax.Array:
    """|q - k| in float32, which Alibi's slope multiplies."""
    return jnp.abs(ids.q - ids.k).astype(jnp.float32)


def capped(s, spec: Spec):
    """(logits in base 2 before the mask, tanh of the soft cap or None) of raw scores s."""
    if spec.logits_soft_cap is None:
        return s * (spec.scale * LOG2_E), None
    bent = jnp.tanh(s * (spec.scale / spec.logits_soft_cap))
    return bent * (spec.logits_soft_cap * LOG2_E), bent


def hidden(s, ids: Ids, run: Run, spec: Spec, *, key_axis: int, kv_length: int | None):
    """`s` with -inf where the query may not see the key.

    The mask is evaluated only in the pieces of `run` that need it. kv_length: keys from this index
    on are padding; None if there is no padding.
    """
    parts = []
    for piece in run.pieces:

        def cut(a, ends=(piece.start - run.start, piece.stop - run.start)):
            if a is None or a.shape[key_axis] == 1:
                return a
            return jax.lax.slice_in_dim(a, *ends, axis=key_axis)

        visible = _visible(Ids(*map(cut, ids)), spec, piece.compare, kv_length)
        parts.append(cut(s) if visible is None else jnp.where(visible, cut(s), -jnp.inf))
    return jnp.concatenate(parts, axis=key_axis)


def _visible(ids: Ids, spec: Spec, compare: bool, kv_length: int | None):
    """Which pairs are visible; None if all are."""
    conditions = []
    if compare:
        conditions.append(spec.mask.allowed(ids.q, ids.k))
        if kv_length is not None:
            conditions.append(ids.k < kv_length)
    if ids.q_segments is not None:
        conditions.append(ids.q_segments == ids.k_segments)
    return functools.reduce(jnp.logical_and, conditions) if conditions else None


def matmul(a, b, contract: tuple[int, int]):
    """a and b contracted over one axis of each, with float32 sums and, for float32 inputs, full
    precision."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def across(x, width: int):
    """x [rows, LANES], all lanes equal, as [rows, width]; no data moves between lanes."""
    if width % LANES == 0:
        return jnp.tile(x, (1, width // LANES))
    return jnp.tile(x, (1, -(-width // LANES)))[:, :width]


def lane_sums(x):
    """[rows, n * LANES] -> [rows, LANES]: per-lane sums of the columns."""
    parts = (x[:, i : i + LANES] for i in range(0, x.shape[1], LANES))
    return functools.reduce(jnp.add, parts)


def as_rows(column, other):
    """[n, LANES], all lanes equal, and [n, 1] -> [1, n] each, in one transpose."""
    lane = jax.lax.broadcasted_iota(jnp.int32, column.shape, 1)
    rows = jnp.where(lane == 0, column, other).T
    return rows[:1], rows[1:2]


def as_columns(row):
    """[1, n] -> [n, LANES], all lanes equal."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T
