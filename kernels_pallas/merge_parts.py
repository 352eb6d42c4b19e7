"""Merges any number of parts of attention with split keys."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .merge import merge


def merge_parts(out, lse):
    """(out [batch, heads, rows, head_dim], lse [batch, heads, rows]) of parts stacked along the
    first axis: out [parts, batch, heads, rows, head_dim], lse [parts, batch, heads, rows].

    Pairs of parts are merged, all pairs in parallel, until one part is left.
    """
    shape = lse.shape[1:]
    # `merge` takes the rows as the heads of a single query.
    out = out.reshape(*out.shape[:2], 1, -1, out.shape[-1])
    lse = lse.reshape(*lse.shape[:2], -1, 1)
    while (count := out.shape[0]) > 1:
        half = count // 2
        pairs = (out[:half], lse[:half], out[half : 2 * half], lse[half : 2 * half])
        merged = jax.vmap(merge)(*pairs)
        rest = (out[2 * half :], lse[2 * half :])
        out, lse = (jnp.concatenate(both) for both in zip(merged, rest, strict=True))
    return out.reshape(*shape, -1), lse.reshape(shape)
