"""How far back a mask looks, for positions that are known only at run time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from .masks import And, Chunked, Mask, Window


def first_key(mask: Mask, position):
    """No query at `position` or later sees a key before this one.

    position: integers, traced or not, also inside a kernel; the result is of the same kind and may
    be negative. 0 for masks whose reach is unknown.
    """
    if isinstance(mask, Window):
        return position - mask.left
    if isinstance(mask, Chunked):
        return position // mask.n * mask.n
    if isinstance(mask, And):
        maximum = jnp.maximum if isinstance(position, jax.Array) else np.maximum
        first, *others = (first_key(m, position) for m in mask.masks)
        for other in others:
            first = maximum(first, other)
        return first
    return position * 0
