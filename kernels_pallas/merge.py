"""Merges two partial softmaxes over disjoint keys: ring attention, split keys, shared prefixes."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def merge(out1, lse1, out2, lse2):
    """Attention over the keys of both parts, given each part's (out, lse).

    out [batch, q_length, heads, head_dim], lse [batch, heads, q_length]; returns (out, lse) of the
    same shapes, out in out1's dtype. A part that saw no key (lse -inf) has no weight; two such
    parts give 0 and -inf. Only one of the parts may include the sinks.
    """
    top = jnp.maximum(lse1, lse2)
    top = jax.lax.stop_gradient(jnp.where(top == -jnp.inf, 0.0, top))
    weight1, weight2 = jnp.exp(lse1 - top), jnp.exp(lse2 - top)
    total = weight1 + weight2
    empty = total == 0
    total = jnp.where(empty, 1.0, total)

    def share(weight, out):
        return jnp.swapaxes(weight / total, 1, 2)[..., None] * out.astype(total.dtype)

    out = (share(weight1, out1) + share(weight2, out2)).astype(out1.dtype)
    return out, jnp.where(empty, -jnp.inf, top + jnp.log(total))
