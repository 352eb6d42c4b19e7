"""Caches for the decoding tests: every kind, with nan in its unused part."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import Alibi, Causal, Chunked, Full, Prefix, Window, attention
from kernels_pallas.caches import ContiguousCache, PagedCache, RingCache, append
from kernels_pallas.decoding import decode

from .cases import FAST, finished

KINDS = ("contiguous", "paged", "ring")
LENGTHS = np.array([37, 5, 61, 0])
CAPACITY = 64

# name: arguments of `make`, and whether a ring can hold what the mask sees.
FEATURES = {
    "causal, one token": (dict(q_length=1), False),
    "full, three tokens, multi-query": (dict(mask=Full(), kv_heads=1), False),
    "window, grouped": (dict(mask=Window(11), kv_heads=2), True),
    "window, sinks, soft cap, one token": (
        dict(mask=Window(7) & Causal(), q_length=1, sinks=True, logits_soft_cap=1.5),
        True,
    ),
    "chunked, alibi, scale": (
        dict(mask=Chunked(13) & Causal(), alibi=True, scale=0.7, kv_heads=2),
        True,
    ),
    "prefix, sinks, alibi, five tokens": (
        dict(mask=Prefix(9), q_length=5, sinks=True, alibi=True, kv_heads=2),
        False,
    ),
}


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def make(
    kind,
    *,
    lengths=LENGTHS,
    q_length=3,
    heads=4,
    kv_heads=4,
    head_dim=8,
    capacity=CAPACITY,
    ring=17,
    page_size=8,
    mask=Causal(),  # noqa: B008
    alibi=False,
    sinks=False,
    dtype=np.float32,
    int8=False,
    **static,
):
    """(q, cache, k, v, options of decode): k and v [batch, capacity, ...] are the contents of each
    row's cache, and continue past its end."""
    batch = len(lengths)
    q = normal(0, batch, q_length, heads, head_dim).astype(dtype)
    k, v = (normal(i, batch, capacity, kv_heads, head_dim).astype(dtype) for i in (1, 2))
    options = dict(static, mask=mask, lengths=jnp.asarray(lengths))
    if alibi:
        options["bias"] = Alibi(np.linspace(0.1, 0.4, heads, dtype=np.float32))
    if sinks:
        options["sinks"] = normal(3, heads)
    cache = empty(
        kind, batch, kv_heads, head_dim, np.int8 if int8 else dtype, capacity, ring, page_size
    )
    return q, fill(poisoned(cache), k, v, lengths), k, v, options


def empty(kind, batch, kv_heads, head_dim, dtype, capacity=CAPACITY, ring=17, page_size=8):
    if kind == "contiguous":
        return ContiguousCache.empty(batch, capacity, kv_heads, head_dim, dtype)
    if kind == "ring":
        return RingCache.empty(batch, ring, kv_heads, head_dim, dtype)
    per_row = -(-capacity // page_size)
    pages = batch * per_row + 3
    order = np.random.default_rng(4).permutation(pages)[: batch * per_row]
    table = order.reshape(batch, per_row).astype(np.int32)
    return PagedCache.empty(pages, page_size, kv_heads, head_dim, dtype, table)


def poisoned(cache):
    """The cache with nan in every slot."""

    def poison(a):
        return np.full(a.shape, np.nan if jnp.issubdtype(a.dtype, jnp.floating) else 77, a.dtype)

    poison_all = lambda x: jax.tree.map(poison, x)
    return dataclasses.replace(cache, k=poison_all(cache.k), v=poison_all(cache.v))


def fill(cache, k, v, lengths):
    """The cache with the first lengths[r] tokens of each row r appended in one call."""
    new = int(max(lengths))
    token = np.asarray(lengths)[:, None] - new + np.arange(new)  # negative: dropped
    rows = np.arange(len(lengths))[:, None]
    run = jax.jit(append, compiler_options=FAST)
    return run(cache, k[rows, token], v[rows, token], np.asarray(lengths))


def whole(q, k, v, options):
    """(out, lse) of the reference: the last rows of attention to all keys, with those past the end
    hidden by a different segment id."""
    options = dict(options)
    lengths = np.asarray(options.pop("lengths"))
    ids = (np.ones(q.shape[:2], int), (np.arange(k.shape[1]) < lengths[:, None]).astype(int))
    offset = lengths - q.shape[1]
    call = dict(options, segment_ids=ids, q_offset=offset, backend="xla", return_lse=True)
    run = jax.jit(lambda q, k, v: attention(q, k, v, **call), compiler_options=FAST)
    return run(q, k, v)


def decoded(q, cache, options, **more):
    """(out, lse) of decode, compiled, with traced lengths."""
    options = dict(options, return_lse=True, **more)
    lengths = options.pop("lengths")
    run = lambda q, cache, lengths: decode(q, cache, lengths=lengths, **options)
    return finished(jax.jit(run, compiler_options=FAST), q, cache, lengths)
