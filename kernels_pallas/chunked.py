"""Attention in blocks of queries, in plain jax: linear memory, and the fast path on CPU.

Each block of queries attends, in one softmax, only to the slice of keys that its mask lets it see,
so a causal mask skips nearly half of the work and a window nearly all of it. Arrays are transposed
once to put heads before lengths, which makes every product a plain batched matmul. There is no
custom derivative, so forward-mode autodiff works too.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from .scores import accumulator, logits, query_ids, softmax, split_heads
from .spec import Operands, Spec

ROWS = 128  # queries per block
UNROLLED_LENGTH = 1024  # up to here, blocks are unrolled and autodiff keeps the probabilities
MAX_GROUPS = 8  # beyond it, at most this many loops: bounds the size of the program

# The query and key axes after heads are moved to the front.
_QUERY_AXES = {"q": 3, "bias": 3, "q_segment_ids": 1}
_KEY_AXES = {"k": 2, "v": 2, "bias": 4, "kv_segment_ids": 1}


def attention(x: Operands, spec: Spec):
    """(out like x.q, lse [batch, heads, q_length]); memory grows with length, not its square."""
    batch, q_length, heads, head_dim = x.q.shape
    x = _heads_first(x)
    if q_length <= UNROLLED_LENGTH:
        rows, run = ROWS, _block
    else:
        rows, run = _group_rows(x, spec), _group
    parts = [run(x, spec, start, min(start + rows, q_length)) for start in range(0, q_length, rows)]
    out, lse = (jnp.concatenate(side, axis=3) for side in zip(*parts, strict=True))
    out = jnp.moveaxis(out, 3, 1).reshape(batch, q_length, heads, head_dim)
    return out, lse.reshape(batch, heads, q_length)


def _heads_first(x: Operands) -> Operands:
    """q [batch, kv_heads, groups, q_length, head_dim], k and v [batch, kv_heads, length, head_dim].

    Groups come before the length, so that heads sharded over devices do not move.
    """
    x = split_heads(x)
    return x._replace(
        q=jnp.moveaxis(x.q, 1, 3), k=jnp.swapaxes(x.k, 1, 2), v=jnp.swapaxes(x.v, 1, 2)
    )


def _axes_of(x: Operands, axes):
    """(field, axis) of the arrays of x with that axis, except a bias that broadcasts along it."""
    for field, axis in axes.items():
        a = getattr(x, field)
        if a is not None and a.shape[axis] > 1:
            yield field, axis


def _cut(x: Operands, axes, start, size: int) -> Operands:
    """x restricted to the queries or keys [start, start + size); start may be traced."""

    def cut(a, axis):
        if isinstance(start, int):
            return jax.lax.slice_in_dim(a, start, start + size, axis=axis)
        return jax.lax.dynamic_slice_in_dim(a, start, size, axis=axis)

    return x._replace(**{f: cut(getattr(x, f), axis) for f, axis in _axes_of(x, axes)})


def _key_range(x: Operands, spec: Spec, start: int, stop: int) -> tuple[int, int]:
    """The keys that the query rows [start, stop) need; at least one, so that no slice is empty."""
    kv_length = x.k.shape[2]
    if spec.q_offset is None:
        return 0, kv_length
    k_start, k_stop = spec.mask.key_range(start + spec.q_offset, stop + spec.q_offset, kv_length)
    if k_start < k_stop:
        return k_start, k_stop
    return (k_start, k_start + 1) if k_start < kv_length else (kv_length - 1, kv_length)


def _compares(spec: Spec, start: int, stop: int, k_start: int, k_stop: int) -> bool:
    """Whether the mask must be evaluated between these rows and keys."""
    if spec.q_offset is None:
        return True
    kind = spec.mask.block_kind(start + spec.q_offset, stop + spec.q_offset, k_start, k_stop)
    return kind != "full"


def _attend(x: Operands, spec: Spec, q_ids, k_ids, compare: bool):
    """(out like x.q, lse [batch, kv_heads, groups, q]): all queries of x attend to all its keys."""
    batch, kv_heads, groups, q_length, head_dim = x.q.shape
    dtype = accumulator(x.q.dtype)
    q = x.q.reshape(batch, kv_heads, groups * q_length, head_dim)
    s = jnp.einsum("bhqd,bhkd->bhqk", q, x.k, preferred_element_type=dtype)
    s = s.reshape(batch, kv_heads, groups, q_length, -1)
    weights, total, lse = softmax(logits(s, x, spec, q_ids, k_ids, compare=compare), x.sinks)
    weights = weights.astype(x.v.dtype).reshape(batch, kv_heads, groups * q_length, -1)
    out = jnp.einsum("bhqk,bhkd->bhqd", weights, x.v, preferred_element_type=dtype)
    return (out.reshape(x.q.shape) / total).astype(x.q.dtype), lse


def _block(x: Operands, spec: Spec, start: int, stop: int):
    """`_attend` for the query rows [start, stop) and the keys that they can see."""
    k_start, k_stop = _key_range(x, spec, start, stop)
    compare = _compares(spec, start, stop, k_start, k_stop)
    x = _cut(x, _QUERY_AXES, start, stop - start)
    x = _cut(x, _KEY_AXES, k_start, k_stop - k_start)
    q_ids = query_ids(x, spec, start, stop - start)
    return _attend(x, spec, q_ids, jnp.arange(k_start, k_stop, dtype=jnp.int32), compare)


def _group_rows(x: Operands, spec: Spec) -> int:
    """Query rows per group: one group if all rows need the same keys, else at most MAX_GROUPS."""
    q_length = x.q.shape[3]
    blocks = -(-q_length // ROWS)
    everything = _key_range(x, spec, 0, q_length)
    alike = everything == _key_range(x, spec, 0, 1) == _key_range(x, spec, q_length - 1, q_length)
    groups = 1 if alike else min(MAX_GROUPS, blocks)
    return -(-blocks // groups) * ROWS


def _group(x: Operands, spec: Spec, start: int, stop: int):
    """`_block` for long lengths: a loop over the blocks of [start, stop). The backward pass
    recomputes each block, so that only one block's scores are in memory at any time."""
    first, last = _key_range(x, spec, start, stop)
    count = -(-(stop - start) // ROWS)
    starts = start + ROWS * np.arange(count)
    width, k_starts = _slices(x, spec, starts, stop, first, last)
    compare = _compares(spec, start, stop, first, last)
    x = _cut(x, _KEY_AXES, first, last - first)
    per_block, x = _split_rows(_cut(x, _QUERY_AXES, start, stop - start), count)

    @functools.partial(jax.checkpoint, prevent_cse=False)  # CSE cannot undo it in a loop
    def block(args):
        rows, q_start, k_start = args
        part = x._replace(**rows)
        if width < last - first:
            part = _cut(part, _KEY_AXES, k_start - first, width)
        q_ids = query_ids(part, spec, q_start, ROWS)
        k_ids = k_start + jnp.arange(width, dtype=jnp.int32)
        return _attend(part, spec, q_ids, k_ids, compare)

    ids = (jnp.asarray(starts, jnp.int32), jnp.asarray(k_starts, jnp.int32))
    out, lse = jax.lax.map(block, (per_block, *ids))
    return _join_rows(out, stop - start), _join_rows(lse, stop - start)


def _slices(x: Operands, spec: Spec, starts, stop: int, first: int, last: int):
    """(width, first key of each block): the smallest common width that covers the keys of every
    block; all of [first, last) unless that saves a quarter, since slicing costs a copy."""
    ranges = [_key_range(x, spec, int(s), min(int(s) + ROWS, stop)) for s in starts]
    width = max(b - a for a, b in ranges)
    if 4 * width > 3 * (last - first):
        return last - first, [first] * len(ranges)
    return width, [min(a, last - width) for a, _ in ranges]


def _split_rows(x: Operands, count: int):
    """({field: [count, ..., ROWS, ...]} of the arrays with a query axis, padded with zeros; the
    others)."""
    split = {}
    for field, axis in _axes_of(x, _QUERY_AXES):
        a = getattr(x, field)
        pad = [(0, 0)] * a.ndim
        pad[axis] = (0, count * ROWS - a.shape[axis])
        a = jnp.pad(a, pad)
        a = a.reshape(*a.shape[:axis], count, ROWS, *a.shape[axis + 1 :])
        split[field] = jnp.moveaxis(a, axis, 0)
    return split, x._replace(**dict.fromkeys(split))


def _join_rows(a, length: int):
    """[count, batch, kv_heads, groups, ROWS, ...] to [batch, kv_heads, groups, length, ...]."""
    a = jnp.moveaxis(a, 0, 3)
    a = a.reshape(*a.shape[:3], -1, *a.shape[5:])
    return jax.lax.slice_in_dim(a, 0, length, axis=3)
