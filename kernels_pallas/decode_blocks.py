"""Decoding attention in plain jax: a loop over blocks of keys.

The loop runs from the first block that any row sees to the last block that any row fills, so the
unused rest of a cache is not read. The softmax is accumulated over the blocks (Milakov & Gimelshein
2018, algorithm 3).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .caches import Cache, Int8, PagedCache, RingCache
from .reach import first_key
from .scores import accumulator, logits
from .spec import Operands, Spec

BLOCK = 1024  # keys


def attention(call, spec: Spec, splits=None):
    """See `decoding.Call`; splits is not used."""
    slots = call.cache.slots
    size = min(_block(call.cache), slots)
    dtype = accumulator(call.q.dtype)
    first = jnp.maximum(first_key(spec.mask, call.lengths - call.q.shape[3]), 0)[:, None]
    start, stop = _range(call, first, size)

    def step(i, carry):
        # A last block that would exceed the cache starts earlier and masks the keys it repeats.
        begin = jnp.minimum(i * size, slots - size)
        slot = begin + jnp.arange(size, dtype=jnp.int32)
        k_ids = _positions(call, slot)
        valid = (slot >= i * size) & (k_ids >= first) & (k_ids < call.lengths[:, None])
        k, v = (_read(call.cache, a, begin, size) for a in (call.cache.k, call.cache.v))
        return _accumulate(carry, call, spec, k, v, k_ids, valid)

    rows = call.q.shape[:4]
    nothing = (
        jnp.full(rows, -jnp.inf, dtype),
        jnp.zeros(rows, dtype),
        jnp.zeros(call.q.shape, dtype),
    )
    if size == slots:
        top, total, sums = step(0, nothing)
    else:
        top, total, sums = jax.lax.fori_loop(start, stop, step, nothing)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    return sums / total[..., None], jnp.where(empty, -jnp.inf, top + jnp.log(total))


def _block(cache: Cache) -> int:
    """Keys per block; a whole number of pages."""
    if not isinstance(cache, PagedCache):
        return BLOCK
    return max(BLOCK // cache.page_size, 1) * cache.page_size


def _range(call, first, size: int):
    """The blocks [start, stop) that at least one row needs."""
    slots = call.cache.slots
    stop = -(-jnp.max(jnp.minimum(call.lengths, slots)) // size)
    if isinstance(call.cache, RingCache):
        return 0, stop
    return jnp.min(jnp.where(call.lengths > 0, first[:, 0], slots)) // size, stop


def _positions(call, slot):
    """int32 [batch, size]: the positions that the slots [size] of each row hold."""
    lengths = call.lengths[:, None]
    return jnp.broadcast_to(call.cache.position(slot, lengths), (lengths.shape[0], slot.shape[0]))


def _read(cache: Cache, buffer, begin, size: int):
    """`size` slots starting at `begin`: [batch, kv_heads, size, head_dim], also for Int8."""
    if not isinstance(cache, PagedCache):
        return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, begin, size, 2), buffer)
    count = size // cache.page_size
    table = jax.lax.dynamic_slice_in_dim(cache.page_table, begin // cache.page_size, count, 1)

    def gather(pages):
        tokens = jnp.moveaxis(pages.at[table].get(mode="clip"), 1, 2)
        return tokens.reshape(*tokens.shape[:2], size, *tokens.shape[4:])

    return jax.tree.map(gather, buffer)


def _accumulate(carry, call, spec: Spec, k, v, k_ids, valid):
    """The running (maximum, total, sums) including these keys; k_ids and valid [batch, size]."""
    top, total, sums = carry
    k, k_scales = _parts(k, call.q.dtype)
    v, v_scales = _parts(v, call.q.dtype)
    # Invalid slots may hold anything, and 0 * nan is nan.
    v = jnp.where(valid[:, None, :, None], v, 0)
    s = jnp.einsum("bngqd,bnkd->bngqk", call.q, k, preferred_element_type=top.dtype)
    if k_scales is not None:
        s = s * k_scales[:, :, None, None].astype(s.dtype)
    s = jnp.where(_wide(valid), _logits(s, call, spec, k_ids), -jnp.inf)
    new_top = jnp.maximum(top, jnp.max(s, axis=-1))
    shift = jnp.where(new_top == -jnp.inf, 0, new_top)
    weights = jnp.exp(s - shift[..., None])
    decay = jnp.exp(top - shift)
    total = total * decay + jnp.sum(weights, axis=-1)
    if v_scales is not None:
        v_scales = jnp.where(valid[:, None], v_scales, 0)
        weights = weights * v_scales[:, :, None, None].astype(weights.dtype)
    added = jnp.einsum(
        "bngqk,bnkd->bngqd", weights.astype(v.dtype), v, preferred_element_type=top.dtype
    )
    return new_top, total, sums * decay[..., None] + added


def _parts(x, dtype):
    """(x in dtype, not yet scaled; scales or None)."""
    return (x.values.astype(dtype), x.scales) if isinstance(x, Int8) else (x, None)


def _wide(a):
    """[batch, size], broadcastable to scores [batch, kv_heads, groups, q_length, size]."""
    return a[:, None, None, None]


def _logits(s, call, spec: Spec, k_ids):
    q_length = call.q.shape[3]
    q_ids = call.lengths[:, None] - q_length + jnp.arange(q_length, dtype=jnp.int32)
    slopes = call.slopes
    if slopes is not None:
        slopes = slopes.astype(s.dtype)[:, :, None, None]
    return logits(
        s,
        Operands(None, None, None, slopes=slopes),
        spec,
        q_ids[:, None, None, :, None],
        _wide(k_ids),
    )
