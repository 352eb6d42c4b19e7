"""Key-value caches: three layouts, each also in int8.

Heads come before lengths, so that the keys of one head are contiguous, as every kernel reads them.
A *slot* is a place in a row's cache; the three layouts differ in which position a slot holds:

- `ContiguousCache`: slot p holds position p;
- `RingCache`: slot p % size holds position p, so that the last `size` positions are kept (for
  windows);
- `PagedCache`: slot p is in page page_table[row, p // page_size] of a pool that all rows share.

Every array may be `Int8`: integers with a float32 scale per token and key head. Caches are pytrees
and are never modified in place, except that `append` under `jax.jit` reuses the memory of a donated
cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Int8:
    """values * scales[..., None]: values int8 [..., head_dim], scales float32 [...]."""

    values: Any
    scales: Any

    @property
    def shape(self):
        return self.values.shape

    @property
    def dtype(self):
        return self.values.dtype


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class ContiguousCache:
    """k, v [batch, kv_heads, max_length, head_dim]: room for max_length tokens per row."""

    k: Any
    v: Any

    @classmethod
    def empty(cls, batch: int, max_length: int, kv_heads: int, head_dim: int, dtype):
        """dtype: the dtype of k and v; int8 for `Int8`."""
        return cls(*_empty((batch, kv_heads, max_length, head_dim), dtype))

    @property
    def capacity(self) -> int:
        """The largest length of a row."""
        return self.k.shape[2]

    @property
    def slots(self) -> int:
        """Slots of a row."""
        return self.k.shape[2]

    def slot(self, position, length):
        """The slot of `position` in a row of `length` tokens; `slots` if it is not kept."""
        return jnp.where((position >= 0) & (position < self.slots), position, self.slots)

    def position(self, slot, length):
        """The position that `slot` holds in a row of `length` tokens; valid if in [0, length)."""
        return slot


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class RingCache:
    """k, v [batch, kv_heads, size, head_dim]: the last `size` tokens of a row of any length.

    With q new tokens and a mask that looks back by `left`, size must be at least left + q.
    """

    k: Any
    v: Any

    @classmethod
    def empty(cls, batch: int, size: int, kv_heads: int, head_dim: int, dtype):
        """dtype: the dtype of k and v; int8 for `Int8`."""
        return cls(*_empty((batch, kv_heads, size, head_dim), dtype))

    @property
    def capacity(self) -> None:
        """None: rows may have any length."""

    @property
    def slots(self) -> int:
        return self.k.shape[2]

    def slot(self, position, length):
        kept = (position >= 0) & (position >= length - self.slots)
        return jnp.where(kept, position % self.slots, self.slots)

    def position(self, slot, length):
        # Not (length - 1 - slot) % size, whose operand is negative before the ring is full.
        newest = (length - 1) % self.slots
        return slot + (length - 1 - newest) - jnp.where(slot > newest, self.slots, 0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class PagedCache:
    """k, v [pages, kv_heads, page_size, head_dim]; page_table int32 [batch, max_pages].

    Table entries beyond a row's length are never read. For `append`, an entry outside [0, pages)
    means that there is no page, and the token is dropped. Rows may share pages that they only read.
    """

    k: Any
    v: Any
    page_table: Any

    @classmethod
    def empty(cls, pages: int, page_size: int, kv_heads: int, head_dim: int, dtype, page_table):
        """dtype: the dtype of k and v; int8 for `Int8`."""
        return cls(*_empty((pages, kv_heads, page_size, head_dim), dtype), page_table)

    @property
    def page_size(self) -> int:
        return self.k.shape[2]

    @property
    def capacity(self) -> int:
        return self.slots

    @property
    def slots(self) -> int:
        return self.page_table.shape[1] * self.page_size

    def slot(self, position, length):
        return jnp.where((position >= 0) & (position < self.slots), position, self.slots)

    def position(self, slot, length):
        return slot


Cache = ContiguousCache | RingCache | PagedCache


def quantize(x) -> Int8:
    """x [..., head_dim] rounded to the nearest of 255 evenly spaced levels up to its largest
    magnitude; the error is at most scales / 2."""
    x = jnp.asarray(x).astype(jnp.float32)
    scales = jnp.max(jnp.abs(x), axis=-1) / 127
    steps = x / jnp.where(scales == 0, 1, scales)[..., None]
    return Int8(jnp.round(steps).astype(jnp.int8), scales)


def append(cache: Cache, k, v, lengths) -> Cache:
    """The cache with k and v appended as the last tokens of each row.

    k, v [batch, new, kv_heads, head_dim], converted to the cache's dtype; lengths integers [batch],
    including the new tokens: token i goes to position lengths - new + i. Tokens at a negative
    position, past the last slot or without a page are dropped; in a ring a token replaces the one
    `size` positions before it. Raises a one-line ValueError if shapes do not match.
    """
    k, v, lengths = (jnp.asarray(a) for a in (k, v, lengths))
    check_cache(cache)
    batch = _rows(cache)
    kv_heads, head_dim = cache.k.shape[1], cache.k.shape[3]
    new = k.shape[1] if k.ndim == 4 else "new"
    for name, x in (("k", k), ("v", v)):
        if x.shape != (batch, new, kv_heads, head_dim):
            raise ValueError(
                f"{name} has shape {x.shape}; allowed for this cache: "
                f"[batch, new, kv_heads, head_dim]={[batch, new, kv_heads, head_dim]}"
            )
    check_lengths(cache, lengths, 0)
    ends = lengths.astype(jnp.int32)[:, None]
    slots = cache.slot(ends - new + jnp.arange(new, dtype=jnp.int32), ends)
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
    if isinstance(cache, PagedCache):
        pages = cache.k.shape[0]
        page = jnp.minimum(slots // cache.page_size, cache.page_table.shape[1] - 1)
        rows = cache.page_table[rows, page].astype(jnp.int32)
        # A negative index would count from the end; one past the end is dropped.
        rows = jnp.where((rows < 0) | (slots == cache.slots), pages, rows)
        slots = slots % cache.page_size

    def write(buffer, x):
        if isinstance(buffer, Int8):
            x = quantize(x)
        put = lambda a, b: a.at[rows, :, slots].set(b.astype(a.dtype), mode="drop")
        return jax.tree.map(put, buffer, x)

    values = dict(k=write(cache.k, k), v=write(cache.v, v))
    if isinstance(cache, PagedCache):
        values["page_table"] = cache.page_table
    return type(cache)(**values)


def check_cache(cache) -> None:
    """Raises a one-line ValueError unless `cache` is a cache with consistent arrays."""
    if not isinstance(cache, Cache):
        raise ValueError(
            f"cache is a {type(cache).__name__}; allowed: ContiguousCache, RingCache, PagedCache"
        )
    rows = "pages" if isinstance(cache, PagedCache) else "batch"
    for name in ("k", "v"):
        shape = tuple(getattr(cache, name).shape)
        if len(shape) != 4 or 0 in shape:
            raise ValueError(
                f"cache {name} has shape {shape}; allowed: [{rows}, kv_heads, length, head_dim]"
            )
    if tuple(cache.k.shape) != tuple(cache.v.shape) or cache.k.dtype != cache.v.dtype:
        raise ValueError(
            f"cache k is {cache.k.dtype}{list(cache.k.shape)} and v {cache.v.dtype}"
            f"{list(cache.v.shape)}; they must be equal"
        )
    for name in ("k", "v"):
        _check_storage(name, getattr(cache, name))
    if isinstance(cache, PagedCache):
        table = cache.page_table
        if len(table.shape) != 2 or 0 in table.shape or table.dtype != jnp.int32:
            raise ValueError(
                f"page_table has shape {tuple(table.shape)}, dtype {table.dtype}; "
                "allowed: int32 [batch, max_pages]"
            )


def check_lengths(cache: Cache, lengths, q_length: int) -> None:
    """Raises a one-line ValueError for lengths of the wrong shape or, if concrete, out of range."""
    batch = _rows(cache)
    if tuple(lengths.shape) != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"lengths have shape {tuple(lengths.shape)}, dtype {lengths.dtype}; "
            f"allowed: integers [batch]=[{batch}]"
        )
    if isinstance(lengths, jax.core.Tracer | jax.ShapeDtypeStruct):
        return
    values = np.asarray(lengths)
    few = values[(values != 0) & (values < q_length)]
    if few.size:
        raise ValueError(
            f"a length is {few[0]} with q_length {q_length}; allowed: 0, or at least q_length, "
            "since lengths include the new tokens"
        )
    if cache.capacity is not None and values.max() > cache.capacity:
        raise ValueError(f"a length is {values.max()}; the cache holds {cache.capacity}")


def _rows(cache: Cache) -> int:
    return (cache.page_table if isinstance(cache, PagedCache) else cache.k).shape[0]


def _empty(shape, dtype):
    """(k, v) of zeros."""
    if jnp.dtype(dtype) != jnp.int8:
        return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
    zeros = lambda: Int8(jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:-1], jnp.float32))
    return zeros(), zeros()


def _check_storage(name: str, x) -> None:
    if isinstance(x, Int8):
        scales = tuple(x.scales.shape)
        if scales != tuple(x.shape[:-1]) or x.scales.dtype != jnp.float32 or x.dtype != jnp.int8:
            raise ValueError(
                f"cache {name} has {x.dtype} values and {x.scales.dtype} scales {list(scales)}; "
                f"allowed: int8 and float32 {list(x.shape[:-1])}"
            )
    elif not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"cache {name} has dtype {x.dtype}; allowed: floats, or Int8 with scales")
