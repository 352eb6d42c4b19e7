"""Which keys a query may see, as a computable predicate instead of a table.

A mask is a frozen, hashable dataclass over *positions*: a query's position is `q_offset + index`, a
key's is its index. All backends use the same three methods:

- `allowed(q_ids, k_ids)`: the predicate on integer arrays (jnp or np) that broadcast;
- `key_range(q_start, q_stop, kv_length)`: the range of keys that a block of queries can see;
- `block_kind(q_start, q_stop, k_start, k_stop)`: "full" (no comparison needed), "partial" or
  "skipped".

All ranges are half-open and plain Python ints, so that skipping is decided at trace time.
Masks combine with `&`: `Causal() & Chunked(8192)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from operator import and_

import numpy as np


def _clip(start: int, stop: int, kv_length: int) -> tuple[int, int]:
    """The part of [start, stop) inside [0, kv_length); start <= stop even if it is empty."""
    start = min(max(start, 0), kv_length)
    return start, min(max(stop, start), kv_length)


LARGEST = 2**30  # the largest number in a mask: positions are int32 in the kernels


def _check_number(mask: Mask, name: str, lowest: int):
    """Raises ValueError unless the field is an integer that can be compared with positions."""
    value = getattr(mask, name)
    if not isinstance(value, int | np.integer) or not lowest <= value <= LARGEST:
        raise ValueError(f"{mask}: {name} is {value!r}; allowed: integers {lowest} to 2**30")


class Mask:
    """The base class of masks; see the module docstring."""

    def allowed(self, q_ids, k_ids):
        """Boolean array of the broadcast shape of q_ids and k_ids: may q see k?"""
        raise NotImplementedError

    def key_range(self, q_start: int, q_stop: int, kv_length: int) -> tuple[int, int]:
        """Smallest [start, stop) within [0, kv_length) that covers the keys seen by the queries
        [q_start, q_stop)."""
        raise NotImplementedError

    def block_kind(self, q_start: int, q_stop: int, k_start: int, k_stop: int) -> str:
        """ "full": every pair is visible; "skipped": none is; "partial": anything else."""
        raise NotImplementedError

    def shifted(self, by: int) -> Mask:
        """This mask with positions counted from `by`: allowed(q + by, k + by)."""
        return Shifted(self, by) if by else self

    def __and__(self, other: Mask) -> Mask:
        """Pairs that both masks allow. `Full` is the neutral element."""
        if not isinstance(other, Mask):
            return NotImplemented
        parts = [m for side in (self, other) for m in getattr(side, "masks", (side,))]
        parts = [m for m in dict.fromkeys(parts) if not isinstance(m, Full)]
        if len(parts) > 1:
            return And(tuple(parts))
        return parts[0] if parts else Full()


@dataclass(frozen=True)
class Full(Mask):
    """Every query sees every key."""

    def allowed(self, q_ids, k_ids):
        return (q_ids == q_ids) & (k_ids == k_ids)

    def key_range(self, q_start, q_stop, kv_length):
        return 0, kv_length

    def block_kind(self, q_start, q_stop, k_start, k_stop):
        return "full"

    def shifted(self, by):
        return self


@dataclass(frozen=True)
class Causal(Mask):
    """k <= q: a query sees itself and everything before it."""

    def allowed(self, q_ids, k_ids):
        return k_ids <= q_ids

    def key_range(self, q_start, q_stop, kv_length):
        return _clip(0, q_stop, kv_length)

    def block_kind(self, q_start, q_stop, k_start, k_stop):
        if k_start >= q_stop:
            return "skipped"
        return "full" if k_stop - 1 <= q_start else "partial"

    def shifted(self, by):
        return self


@dataclass(frozen=True)
class Window(Mask):
    """q - left <= k <= q + right. ValueError if left or right is negative."""

    left: int
    right: int = 0

    def __post_init__(self):
        _check_number(self, "left", 0)
        _check_number(self, "right", 0)

    def allowed(self, q_ids, k_ids):
        return (k_ids >= q_ids - self.left) & (k_ids <= q_ids + self.right)

    def key_range(self, q_start, q_stop, kv_length):
        return _clip(q_start - self.left, q_stop + self.right, kv_length)

    def block_kind(self, q_start, q_stop, k_start, k_stop):
        if k_stop - 1 < q_start - self.left or k_start > q_stop - 1 + self.right:
            return "skipped"
        inside = k_start >= q_stop - 1 - self.left and k_stop - 1 <= q_start + self.right
        return "full" if inside else "partial"

    def shifted(self, by):
        return self


@dataclass(frozen=True)
class Prefix(Mask):
    """k <= q or k < n: causal, except that every query sees the first n keys (a prefix LM)."""

    n: int

    def __post_init__(self):
        _check_number(self, "n", 0)

    def allowed(self, q_ids, k_ids):
        return (k_ids <= q_ids) | (k_ids < self.n)

    def key_range(self, q_start, q_stop, kv_length):
        return _clip(0, max(q_stop, self.n), kv_length)

    def block_kind(self, q_start, q_stop, k_start, k_stop):
        if k_start >= max(q_stop, self.n):
            return "skipped"
        return "full" if k_stop - 1 <= max(q_start, self.n - 1) else "partial"

    def shifted(self, by):
        return Prefix(max(self.n - by, 0))


@dataclass(frozen=True)
class Chunked(Mask):
    """q // n == k // n: attention within blocks of n positions; use `& Causal()` in a decoder."""

    n: int

    def __post_init__(self):
        _check_number(self, "n", 1)

    def allowed(self, q_ids, k_ids):
        return q_ids // self.n == k_ids // self.n

    def key_range(self, q_start, q_stop, kv_length):
        n = self.n
        return _clip(q_start // n * n, ((q_stop - 1) // n + 1) * n, kv_length)

    def block_kind(self, q_start, q_stop, k_start, k_stop):
        n = self.n
        q_first, q_last = q_start // n, (q_stop - 1) // n
        k_first, k_last = k_start // n, (k_stop - 1) // n
        if k_last < q_first or k_first > q_last:
            return "skipped"
        return "full" if q_first == q_last == k_first == k_last else "partial"

    def shifted(self, by):
        return super().shifted(by % self.n)


@dataclass(frozen=True)
class And(Mask):
    """Pairs that all `masks` allow; the result of `&`.

    Ranges are intersected, which may keep a block in which each mask allows some pair but no pair
    satisfies all of them: such a block is "partial", never wrongly "full" or "skipped".
    """

    masks: tuple[Mask, ...]

    def allowed(self, q_ids, k_ids):
        return reduce(and_, (m.allowed(q_ids, k_ids) for m in self.masks))

    def key_range(self, q_start, q_stop, kv_length):
        starts, stops = zip(
            *(m.key_range(q_start, q_stop, kv_length) for m in self.masks), strict=True
        )
        return _clip(max(starts), min(stops), kv_length)

    def block_kind(self, q_start, q_stop, k_start, k_stop):
        kinds = {m.block_kind(q_start, q_stop, k_start, k_stop) for m in self.masks}
        if "skipped" in kinds:
            return "skipped"
        return "full" if kinds == {"full"} else "partial"

    def shifted(self, by):
        return reduce(and_, (m.shifted(by) for m in self.masks))


@dataclass(frozen=True)
class Shifted(Mask):
    """`mask` with its position `by` as position 0; the result of `Mask.shifted`."""

    mask: Mask
    by: int

    def allowed(self, q_ids, k_ids):
        return self.mask.allowed(q_ids + self.by, k_ids + self.by)

    def key_range(self, q_start, q_stop, kv_length):
        by = self.by
        start, stop = self.mask.key_range(q_start + by, q_stop + by, kv_length + by)
        return _clip(start - by, stop - by, kv_length)

    def block_kind(self, q_start, q_stop, k_start, k_stop):
        return self.mask.block_kind(*(p + self.by for p in (q_start, q_stop, k_start, k_stop)))

    def shifted(self, by):
        return self.mask.shifted(self.by + by)
