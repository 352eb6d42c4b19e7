"""From raw scores to softmax weights, shared by the backends in plain jax.

Scores are laid out [batch, kv_heads, groups, q, k]; a query head is kv_head * groups + group.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .spec import Operands, Spec


def accumulator(dtype):
    """The dtype of logits, softmax and lse: float32, or float64 for float64 inputs."""
    return jnp.promote_types(dtype, jnp.float32)


def split_heads(x: Operands) -> Operands:
    """`x` with every heads axis split into (kv_heads, groups), without moving data.

    q [batch, q, kv_heads, groups, head_dim], bias with five dimensions, slopes and sinks
    [kv_heads, groups, 1, 1] in the accumulator's dtype.
    """
    batch, q_length, heads, head_dim = x.q.shape
    kv_heads = x.k.shape[2]
    groups = heads // kv_heads
    dtype = accumulator(x.q.dtype)
    bias = x.bias
    if bias is not None:
        by_head = (1, 1) if bias.shape[1] == 1 else (kv_heads, groups)
        bias = bias.reshape(bias.shape[0], *by_head, *bias.shape[2:])

    def per_head(a):
        return None if a is None else a.astype(dtype).reshape(kv_heads, groups, 1, 1)

    return x._replace(
        q=x.q.reshape(batch, q_length, kv_heads, groups, head_dim),
        bias=bias,
        slopes=per_head(x.slopes),
        sinks=per_head(x.sinks),
    )


def query_ids(x: Operands, spec: Spec, start, count: int):
    """Positions of the query rows [start, start + count): [count, 1] or [batch, 1, 1, count, 1]."""
    rows = (start + jnp.arange(count, dtype=jnp.int32))[:, None]
    if spec.q_offset is not None:
        return rows + spec.q_offset
    return rows + x.q_offset.astype(jnp.int32).reshape(-1, 1, 1, 1, 1)


def logits(s, x: Operands, spec: Spec, q_ids, k_ids, *, compare: bool = True):
    """Scale, soft cap, bias, mask, in that order.

    s raw scores [batch, kv_heads, groups, q, k]; x restricted to these queries and keys, with heads
    split; q_ids as from `query_ids`, k_ids [k]. compare=False skips the mask where it allows all
    pairs. Invisible pairs become -inf.
    """
    s = s * spec.scale
    if spec.logits_soft_cap is not None:
        s = spec.logits_soft_cap * jnp.tanh(s / spec.logits_soft_cap)
    if x.bias is not None:
        s = s + x.bias.astype(s.dtype)
    if x.slopes is not None:
        s = s - x.slopes * jnp.abs(q_ids - k_ids).astype(s.dtype)
    if compare:
        s = jnp.where(spec.mask.allowed(q_ids, k_ids), s, -jnp.inf)
    if x.q_segment_ids is not None:
        same = x.q_segment_ids[:, :, None] == x.kv_segment_ids[:, None, :]
        s = jnp.where(same[:, None, None], s, -jnp.inf)
    return s


def sink_gradient(sinks, lse, delta):
    """The gradient of the sinks [heads], summed over all queries.

    lse, delta [batch, heads, q_length] as in `piece_gradients`; lse includes the sink. A sink of
    -inf has no weight in any softmax, and no gradient.
    """
    gap = jnp.where(lse == -jnp.inf, -jnp.inf, sinks.astype(lse.dtype)[:, None] - lse)
    return -jnp.sum(jnp.exp(gap) * delta, axis=(0, 2))


def softmax(s, sinks):
    """The softmax over the last axis; the caller divides by the total.

    s [batch, kv_heads, groups, q, k], sinks [kv_heads, groups, 1, 1] or None. Returns (weights like
    s, total [..., q, 1] to divide by, lse [..., q]). A row in which every score is -inf has weights
    0, total 1, lse -inf and finite gradients.
    """
    top = jnp.max(s, axis=-1, keepdims=True)
    if sinks is not None:
        top = jnp.maximum(top, sinks)
    # The shift cancels in the result and needs no gradient; -inf - -inf would be nan.
    top = jax.lax.stop_gradient(jnp.where(top == -jnp.inf, 0.0, top))
    weights = jnp.exp(s - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks - top)
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
    return weights, total, lse[..., 0]
