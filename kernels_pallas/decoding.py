"""Attention of a few new tokens to a cache, and the arguments of its backends."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import decode_blocks
from .caches import Cache, Int8, PagedCache, RingCache, check_cache, check_lengths
from .choose import Backend, Rule, choose, lazily
from .device import HOPPER
from .masks import Causal
from .merge import merge
from .reach import first_key
from .spec import Alibi
from .validate import prepare


class Call(NamedTuple):
    """The arrays of a call. Query head n * groups + g uses key head n.

    A backend takes (call, spec, splits) and returns (out like q in float32, lse float32 [batch,
    kv_heads, groups, q_length]), neither including the sinks.
    """

    q: Any  # [batch, kv_heads, groups, q_length, head_dim]
    cache: Cache
    lengths: Any  # int32 [batch]
    slopes: Any = None  # [kv_heads, groups]


BACKENDS: dict[str, Backend] = {
    "xla": Backend(decode_blocks.attention),
    "tpu": Backend(lazily("tpu.decode", "attention"), ("tpu",), lazily("tpu.decode", "check")),
    "gpu": Backend(
        lazily("gpu.decode", "attention"), ("gpu",), lazily("gpu.decode", "check"), HOPPER
    ),
}

AUTO: tuple[Rule, ...] = (
    Rule("tpu", "the kernel that reads only what each row sees"),
    Rule("gpu", "the kernel that reads only what each row sees"),
    Rule("xla", "a loop over blocks of keys, up to the longest row"),
)


def decode(
    q,
    cache,
    *,
    lengths,
    mask=Causal(),  # noqa: B008 (frozen)
    scale=None,
    logits_soft_cap=None,
    sinks=None,
    bias=None,
    splits=None,
    backend="auto",
    return_lse=False,
):
    """`attention` of the newest tokens of each row to the row's cache, which already holds them.

    q        [batch, q_length, heads, head_dim] with a small q_length: query i is at position
             lengths - q_length + i
    cache    ContiguousCache, RingCache or PagedCache, of q's dtype or Int8
    lengths  integers [batch]: tokens in each row, including the new ones. Only keys at positions
             below `lengths` are visible, whatever the mask; the rest of the cache is ignored, and
             keys before the first that the mask can reach are not read. A row of length 0 gives
             out 0. A traced length beyond the cache's capacity sees the whole cache.
    bias     None or Alibi(slopes [heads])
    splits   parts into which the keys are split, to be processed in parallel; None: the backend's
             choice. "xla" never splits.
    mask, scale, logits_soft_cap, sinks, return_lse and results: as in `attention`. With a
    RingCache, the mask must bound how far back it looks (Window, Chunked).

    Not differentiable in reverse mode. Invalid arguments raise a one-line ValueError.
    """
    call, spec, sinks = _prepare(q, cache, lengths, mask, scale, logits_soft_cap, sinks, bias)
    _check_splits(splits)
    call = jax.tree.map(jnp.asarray, call)
    name, _ = choose(backend, BACKENDS, AUTO, call, spec)
    out, lse = BACKENDS[name].run(call, spec, splits)
    batch, q_length, heads, head_dim = q.shape
    out = jnp.moveaxis(out, 3, 1).reshape(batch, q_length, heads, head_dim)
    lse = lse.reshape(batch, heads, q_length)
    if sinks is not None:  # one more key, with value 0
        sinks = jnp.broadcast_to(jnp.asarray(sinks).astype(lse.dtype)[:, None], lse.shape)
        out, lse = merge(out, lse, jnp.zeros_like(out), sinks)
    out = out.astype(q.dtype)
    return (out, lse) if return_lse else out


def explain_decode(q, cache, *, lengths, backend="auto", splits=None, return_lse=False, **call):
    """Which backend `decode` would choose for the same arguments, and why; runs nothing.

    Also takes jax.ShapeDtypeStruct in place of arrays. Same errors as `decode`.
    """
    names = ("mask", "scale", "logits_soft_cap", "sinks", "bias")
    defaults = dict.fromkeys(names) | dict(mask=Causal())
    call, spec, _ = _prepare(q, cache, lengths, **(defaults | call))
    _check_splits(splits)
    return ": ".join(choose(backend, BACKENDS, AUTO, call, spec))


def bytes_moved(q, cache, lengths, mask=Causal()) -> int:  # noqa: B008 (frozen)
    """Bytes that `decode` has to move: the keys and values that at least one query sees, their
    scales and page numbers, q and out. lengths: concrete, [batch]."""
    stop = np.asarray(lengths, np.int64)
    start = np.maximum(first_key(mask, np.maximum(stop - q.shape[1], 0)), 0)
    tokens = int(np.sum(np.maximum(stop - start, 0)))
    per_token = cache.k.shape[1] * cache.k.shape[3] * cache.k.dtype.itemsize
    if isinstance(cache.k, Int8):
        per_token += cache.k.shape[1] * cache.k.scales.dtype.itemsize
    pages = -(-tokens // cache.page_size) if isinstance(cache, PagedCache) else 0
    return 2 * tokens * per_token + 4 * pages + 2 * int(np.prod(q.shape)) * q.dtype.itemsize


def _prepare(q, cache, lengths, mask, scale, logits_soft_cap, sinks, bias):
    """Checks the arguments; returns (Call, Spec, sinks or None)."""
    check_cache(cache)
    q = q if hasattr(q, "dtype") else np.asarray(q)
    lengths = lengths if hasattr(lengths, "dtype") else np.asarray(lengths)
    if bias is not None and not isinstance(bias, Alibi):
        raise ValueError(f"bias is a {type(bias).__name__}; allowed: None or Alibi(slopes)")
    table = getattr(cache, "page_table", cache.k)
    heads_last = (table.shape[0], cache.slots, cache.k.shape[1], cache.k.shape[3])
    dtype = q.dtype if isinstance(cache.k, Int8) else cache.k.dtype
    keys = jax.ShapeDtypeStruct(heads_last, dtype)
    shared = dict(mask=mask, bias=bias, scale=scale, logits_soft_cap=logits_soft_cap, sinks=sinks)
    operands, spec = prepare(q, keys, keys, q_offset=np.zeros(table.shape[:1], int), **shared)
    batch, q_length, heads, head_dim = q.shape
    check_lengths(cache, lengths, q_length)
    if isinstance(cache, RingCache):
        _check_ring(cache, mask, q_length)
    split = (cache.k.shape[1], heads // cache.k.shape[1])
    by_head = lambda a: jnp.asarray(a).reshape(split)
    if not isinstance(q, jax.ShapeDtypeStruct):
        q = jnp.moveaxis(jnp.asarray(q).reshape(batch, q_length, *split, head_dim), 1, 3)
        lengths = jnp.asarray(lengths).astype(jnp.int32)
    else:
        q = jax.ShapeDtypeStruct((batch, *split, q_length, head_dim), q.dtype)
    slopes = None if operands.slopes is None else by_head(operands.slopes)
    return Call(q, cache, lengths, slopes), spec, operands.sinks


def _check_ring(cache: RingCache, mask, q_length: int) -> None:
    """Checks that the last new token does not overwrite the oldest key that the first one sees."""
    queries = np.arange(2 * cache.slots + q_length)
    back = int(np.max(queries - first_key(mask, queries)))
    if back + q_length > cache.slots:
        looks = f"looks back {back}" if back < cache.slots else "looks back further"
        raise ValueError(
            f"a ring cache of {cache.slots} with q_length {q_length} and {mask}, which {looks}; "
            f"allowed: masks with a Window or Chunked that looks back at most "
            f"{cache.slots - q_length}"
        )


def _check_splits(splits) -> None:
    if splits is not None and not (isinstance(splits, int) and splits >= 1):
        raise ValueError(f"splits is {splits!r}; allowed: None or an int >= 1")
