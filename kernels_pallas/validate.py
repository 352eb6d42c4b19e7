"""Checks the arguments of a call and turns them into `Operands` and `Spec`.

Looks only at shapes and dtypes, so it takes jax.ShapeDtypeStruct as well as arrays. Every error is
a one-line ValueError that names the value and what is allowed.
"""

from __future__ import annotations

import math
import numbers
import operator

import jax.numpy as jnp
import numpy as np

from .masks import LARGEST, Causal, Mask
from .spec import Alibi, Operands, Spec

DTYPES = ("float32", "bfloat16", "float16", "float64")


def prepare(
    q,
    k,
    v,
    *,
    mask=Causal(),  # noqa: B008 (frozen)
    bias=None,
    segment_ids=None,
    scale=None,
    logits_soft_cap=None,
    sinks=None,
    q_offset=0,
) -> tuple[Operands, Spec]:
    """The checked call; arguments as in `kernels_pallas.attention`."""
    q, k, v = _array(q), _array(k), _array(v)
    _check_qkv(q, k, v)
    batch, q_length, heads, head_dim = q.shape
    if not isinstance(mask, Mask):
        raise ValueError(f"mask is {mask!r}; allowed: Full, Causal, Window, Prefix, Chunked and &")
    bias, slopes = _bias(bias, (batch, heads, q_length, k.shape[1]))
    q_segment_ids, kv_segment_ids = _segment_ids(segment_ids, batch, q_length, k.shape[1])
    static_offset, q_offset = _q_offset(q_offset, batch)
    operands = Operands(
        q=q,
        k=k,
        v=v,
        bias=bias,
        slopes=slopes,
        q_segment_ids=q_segment_ids,
        kv_segment_ids=kv_segment_ids,
        sinks=None if sinks is None else _per_head("sinks", sinks, heads),
        q_offset=q_offset,
    )
    spec = Spec(
        mask=mask,
        scale=head_dim**-0.5 if scale is None else _number("scale", scale),
        logits_soft_cap=_soft_cap(logits_soft_cap),
        q_offset=static_offset,
    )
    return operands, spec


def _array(x):
    """x, converted to an array if it is a list, tuple or number."""
    return x if hasattr(x, "shape") and hasattr(x, "dtype") else np.asarray(x)


def _check_qkv(q, k, v):
    for name, x in (("q", q), ("k", k), ("v", v)):
        if len(x.shape) != 4:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; allowed: [batch, length, heads, head_dim]"
            )
        if str(x.dtype) not in DTYPES:
            raise ValueError(f"{name} has dtype {x.dtype}; allowed: {', '.join(DTYPES)}")
        if 0 in x.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; every size must be >= 1")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; must be equal")
    if tuple(k.shape) != tuple(v.shape):
        raise ValueError(f"k has shape {tuple(k.shape)} and v {tuple(v.shape)}; they must be equal")
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"q has batch {q.shape[0]} and k, v {k.shape[0]}; they must be equal")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q has head_dim {q.shape[3]} and k, v {k.shape[3]}; they must be equal")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q has {q.shape[2]} heads and k, v {k.shape[2]}; the first must be a multiple"
        )


def _per_head(name, x, heads):
    x = _array(x)
    if tuple(x.shape) != (heads,) or not jnp.issubdtype(x.dtype, jnp.number):
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, dtype {x.dtype}; "
            f"allowed: numbers [heads]=[{heads}]"
        )
    return x


def _bias(bias, full):
    """(4-dimensional bias or None, slopes or None)."""
    if bias is None:
        return None, None
    if isinstance(bias, Alibi):
        return None, _per_head("Alibi slopes", bias.slopes, full[1])
    bias = _array(bias)
    shape = (1,) * (4 - len(bias.shape)) + tuple(bias.shape)
    fits = len(shape) == 4 and all(a in (1, b) for a, b in zip(shape, full, strict=True))
    if not fits or not jnp.issubdtype(bias.dtype, jnp.floating):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}, dtype {bias.dtype}; allowed: Alibi or floats "
            f"that broadcast to [batch, heads, q_length, kv_length]={list(full)}"
        )
    return (bias if len(bias.shape) == 4 else bias.reshape(shape)), None


def _segment_ids(ids, batch, q_length, kv_length):
    """(q_segment_ids, kv_segment_ids), both None if there are no segment ids."""
    if ids is None:
        return None, None
    if not isinstance(ids, tuple | list):
        if q_length != kv_length:
            raise ValueError(
                f"one segment_ids array for q_length {q_length} and kv_length {kv_length}; allowed "
                "for equal lengths, else a pair (q_segment_ids, kv_segment_ids)"
            )
        ids = (ids, ids)
    if len(ids) != 2:
        raise ValueError(f"segment_ids has {len(ids)} entries; allowed: an array or a pair")
    named = zip(("q", "kv"), ids, (q_length, kv_length), strict=True)
    return tuple(
        check_segment_ids(f"{side} segment_ids", x, (batch, length)) for side, x, length in named
    )


def check_segment_ids(name: str, x, shape: tuple[int, int]):
    """`x` as an array; ValueError unless it holds integers [batch, length]=`shape`."""
    x = _array(x)
    if tuple(x.shape) != shape or not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(
            f"{name} have shape {tuple(x.shape)}, dtype {x.dtype}; "
            f"allowed: integers [batch, length]={list(shape)}"
        )
    return x


def _q_offset(q_offset, batch):
    """(static int, None) or (None, array)."""
    try:
        offset = operator.index(q_offset)
    except TypeError:  # an array with axes, a float, or a traced value
        x = _array(q_offset)
    else:
        if abs(offset) > LARGEST:
            raise ValueError(f"q_offset is {offset}; allowed: -2**30 to 2**30")
        return offset, None
    if tuple(x.shape) not in ((), (batch,)) or not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(
            f"q_offset has shape {tuple(x.shape)}, dtype {x.dtype}; "
            f"allowed: an int or integers [batch]=[{batch}]"
        )
    return None, x


def _number(name, x):
    if isinstance(x, numbers.Real) or (isinstance(x, np.ndarray) and x.ndim == 0):
        if math.isnan(x):
            raise ValueError(f"{name} is nan; allowed: a number")
        return float(x)
    raise ValueError(f"{name} is {x!r}; allowed: a Python number (multiply q for a learned one)")


def _soft_cap(cap):
    if cap is None:
        return None
    cap = _number("logits_soft_cap", cap)
    if not (cap > 0 and math.isfinite(cap)):
        raise ValueError(f"logits_soft_cap is {cap}; allowed: None or a finite number > 0")
    return cap
