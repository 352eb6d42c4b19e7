"""Gradients of attention to some of the keys, given the softmax's denominator over all keys.

With weights w_ij = exp(s_ij - lse_i) and lse held constant, pulling back (sum_j w_ij v_j,
sum_j w_ij) with (dout, -delta) gives the logits the gradient w_ij (dout_i . v_j - delta_i) of Dao
et al. 2022, appendix B.2. So the vjp of one function covers every feature, in plain jax and on
every platform. Keys are processed in blocks, so memory is linear in length.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .scores import accumulator, logits, query_ids, split_heads
from .spec import Operands, Spec

KEYS = 512  # keys per block


def gradients(x: Operands, spec: Spec, dout, lse, delta) -> Operands:
    """The gradients of x's arrays, None for those without one; bias arrays are not supported.

    x [batch, length, heads, head_dim]; dout like x.q; lse and delta [batch, heads, q_length]:
    delta is the sum of out * dout over head_dim minus the gradient of lse. The gradient of sinks is
    not computed here: it is -sum(exp(sink - lse) * delta), once for all keys.
    """
    dtype = accumulator(x.q.dtype)
    kv_length = x.k.shape[1]
    size = min(KEYS, kv_length)
    blocks = _key_blocks(x, size)
    whole = dict(q=x.q.astype(dtype))
    if x.slopes is not None:
        whole["slopes"] = x.slopes.astype(dtype)
    cotangents = dout.astype(dtype), -delta.astype(dtype)

    def step(sums, block):
        index, k, v, segment_ids = block

        def piece(whole, k, v):
            part = x._replace(k=k, v=v, kv_segment_ids=segment_ids, sinks=None, **whole)
            return _weighted(part, spec, lse, index * size, kv_length)

        _, pull = jax.vjp(piece, whole, k, v)
        d_whole, dk, dv = pull(cotangents)
        return jax.tree.map(jnp.add, sums, d_whole), (dk, dv)

    sums, (dk, dv) = jax.lax.scan(step, jax.tree.map(jnp.zeros_like, whole), blocks)
    whole_keys = lambda a, like: _join(a)[:, :kv_length].astype(like.dtype)
    slopes = sums["slopes"].astype(x.slopes.dtype) if x.slopes is not None else None
    return Operands(
        sums["q"].astype(x.q.dtype), whole_keys(dk, x.k), whole_keys(dv, x.v), slopes=slopes
    )


def _key_blocks(x: Operands, size: int):
    """(index, k, v, kv_segment_ids or None), each with the blocks along the first axis."""
    dtype = accumulator(x.q.dtype)

    def cut(a):
        if a is None:
            return None
        pad = [(0, 0), (0, -a.shape[1] % size)] + [(0, 0)] * (a.ndim - 2)
        a = jnp.pad(a, pad)
        return jnp.moveaxis(a.reshape(a.shape[0], -1, size, *a.shape[2:]), 1, 0)

    k, v = cut(x.k.astype(dtype)), cut(x.v.astype(dtype))
    return jnp.arange(k.shape[0], dtype=jnp.int32), k, v, cut(x.kv_segment_ids)


def _join(a):
    """[blocks, batch, size, ...] to [batch, blocks * size, ...]."""
    a = jnp.moveaxis(a, 0, 1)
    return a.reshape(a.shape[0], -1, *a.shape[3:])


def _weighted(x: Operands, spec: Spec, lse, k_start, kv_length):
    """(weighted sum of values like x.q, sum of weights [batch, heads, q_length])."""
    batch, q_length, heads, head_dim = x.q.shape
    k_ids = k_start + jnp.arange(x.k.shape[1], dtype=jnp.int32)
    x = split_heads(x)
    s = jnp.einsum("bqhgd,bkhd->bhgqk", x.q, x.k)
    s = logits(s, x, spec, query_ids(x, spec, 0, q_length), k_ids)
    s = jnp.where(k_ids < kv_length, s, -jnp.inf)
    # A query that sees no key has lse -inf, and its weights are 0.
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse).reshape(*s.shape[:-1], 1)
    weights = jnp.exp(s - lse)
    out = jnp.einsum("bhgqk,bkhd->bqhgd", weights, x.v)
    return out.reshape(batch, q_length, heads, head_dim), weights.sum(-1).reshape(
        batch, heads, q_length
    )
