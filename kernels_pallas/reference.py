"""The definition: attention as two einsums around a softmax, with all scores in memory."""

from __future__ import annotations

import jax.numpy as jnp

from .scores import accumulator, logits, query_ids, softmax, split_heads
from .spec import Operands, Spec


def attention(x: Operands, spec: Spec):
    """(out like x.q, lse [batch, heads, q_length]); memory grows with q_length * kv_length."""
    batch, q_length, heads, head_dim = x.q.shape
    kv_length = x.k.shape[1]
    dtype = accumulator(x.q.dtype)
    x = split_heads(x)
    s = jnp.einsum("bqhgd,bkhd->bhgqk", x.q, x.k, preferred_element_type=dtype)
    k_ids = jnp.arange(kv_length, dtype=jnp.int32)
    s = logits(s, x, spec, query_ids(x, spec, 0, q_length), k_ids)
    weights, total, lse = softmax(s, x.sinks)
    out = jnp.einsum(
        "bhgqk,bkhd->bhgqd", weights.astype(x.v.dtype), x.v, preferred_element_type=dtype
    )
    out = jnp.moveaxis(out / total, 3, 1).astype(x.q.dtype)
    return out.reshape(batch, q_length, heads, head_dim), lse.reshape(batch, heads, q_length)
