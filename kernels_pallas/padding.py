"""Padding of arrays to whole blocks."""

from __future__ import annotations

import jax.numpy as jnp


def pad_length(a, axis: int, block: int, value=0):
    """`a` with `axis` padded to a multiple of `block`."""
    missing = -a.shape[axis] % block
    if not missing:
        return a
    widths = [(0, 0)] * a.ndim
    widths[axis] = (0, missing)
    return jnp.pad(a, widths, constant_values=value)
