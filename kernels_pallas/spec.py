"""The two parts of an attention call: `Operands` holds its arrays, `Spec` everything static.

Backends take `(operands, spec)` and return `(out, lse)`. `Spec` is hashable, so that it can be the
one non-differentiated argument of a kernel's custom_vjp or a jit's static argument.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from .masks import Mask


class Unsupported(ValueError):
    """Raised by a backend that cannot run a call; the message is the reason, on one line."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Alibi:
    """Linear bias -slope * |q_position - k_position|; slopes [heads], differentiable."""

    slopes: Any


class Operands(NamedTuple):
    """The arrays of a call; None for those it lacks."""

    q: Any  # [batch, q_length, heads, head_dim]
    k: Any  # [batch, kv_length, kv_heads, head_dim]
    v: Any  # [batch, kv_length, kv_heads, head_dim]
    bias: Any = None  # four dimensions, each that of [batch, heads, q_length, kv_length] or 1
    slopes: Any = None  # [heads]
    q_segment_ids: Any = None  # [batch, q_length]
    kv_segment_ids: Any = None  # [batch, kv_length]
    sinks: Any = None  # [heads]
    q_offset: Any = None  # [] or [batch]; None: Spec.q_offset holds


@dataclass(frozen=True)
class Spec:
    """The static part of a call."""

    mask: Mask
    scale: float
    logits_soft_cap: float | None = None
    q_offset: int | None = 0  # None: known only at run time, in Operands.q_offset
