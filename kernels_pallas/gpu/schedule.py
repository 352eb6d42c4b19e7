"""Which blocks of scores a thread block visits, decided at trace time.

A thread block owns one block of *rows* and streams blocks of *columns* past it: rows are queries
and columns keys in the forward pass and for the gradient of queries, and the other way around for
the gradients of keys and values. The columns that a row block needs are a range with three parts:
partial, full, partial. It visits the partial blocks first and then the full ones, so that a kernel
has two loop bodies, the second of which needs no comparison. Blocks outside the range are never
loaded. The table has one line per row block; the kinds of all block pairs are computed once, on the
host.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from ..masks import Mask

SKIPPED, PARTIAL, FULL = range(3)
KINDS = dict(skipped=SKIPPED, partial=PARTIAL, full=FULL)


class Schedule(NamedTuple):
    """A line of `table` is (block, start, full_start, full_stop, stop): the row block, the range of
    column blocks that it visits, and the part of the range in which every pair is visible. Lines
    with the most work come first, so that the last thread blocks to run are short."""

    table: np.ndarray  # int32 [row blocks, 5]
    partial: bool  # whether any visit is to a partial block
    full: bool  # whether any visit is to a full one

    @property
    def visits(self) -> int:
        """Number of blocks of scores that are computed."""
        return int((self.table[:, 4] - self.table[:, 1]).sum())


@functools.lru_cache(maxsize=256)
def schedule(
    mask: Mask,
    rows: int,
    columns: int,
    q_length: int,
    kv_length: int,
    q_offset: int | None,
    rows_are_keys: bool = False,
) -> Schedule:
    """The visits of blocks of `rows` to blocks of `columns`.

    q_offset is the position of query 0; None if it is known only at run time, in which case every
    block is visited and compared. Every row block visits at least one column block.
    """
    q_block, k_block = (columns, rows) if rows_are_keys else (rows, columns)
    kinds = _kinds(mask, q_block, k_block, q_length, kv_length, q_offset)
    if rows_are_keys:
        kinds = kinds.T
    lines = [(block, *_range(line)) for block, line in enumerate(kinds)]
    lines.sort(key=lambda line: line[1] - line[4])
    table = np.asarray(lines, np.int32)
    full = table[:, 3] - table[:, 2]
    return Schedule(table, bool((table[:, 4] - table[:, 1] > full).any()), bool(full.any()))


def _kinds(mask, q_block, k_block, q_length, kv_length, q_offset) -> np.ndarray:
    """uint8 [query blocks, key blocks] of SKIPPED, PARTIAL, FULL."""
    shape = (-(-q_length // q_block), -(-kv_length // k_block))
    if q_offset is None:
        return np.full(shape, PARTIAL, np.uint8)
    kinds = np.zeros(shape, np.uint8)
    for i in range(shape[0]):
        q_start = i * q_block + q_offset
        q_stop = min((i + 1) * q_block, q_length) + q_offset
        start, stop = mask.key_range(q_start, q_stop, kv_length)
        for j in range(start // k_block, -(-stop // k_block)):
            k_start, k_stop = j * k_block, (j + 1) * k_block
            kind = KINDS[mask.block_kind(q_start, q_stop, k_start, min(k_stop, kv_length))]
            # The keys past kv_length are padding, and must be hidden.
            kinds[i, j] = kind if k_stop <= kv_length else min(kind, PARTIAL)
    return kinds


def _range(kinds: np.ndarray) -> tuple[int, int, int, int]:
    """(start, full_start, full_stop, stop) of one row block's columns: the longest run of full
    blocks, within the range of all blocks that are not skipped."""
    visited = np.flatnonzero(kinds)
    if not visited.size:
        return 0, 0, 0, 1
    start, stop = int(visited[0]), int(visited[-1]) + 1
    edges = np.flatnonzero(np.diff(np.concatenate(([0], kinds == FULL, [0]))))
    if not edges.size:
        return start, start, start, stop
    begins, ends = edges[::2], edges[1::2]
    longest = int(np.argmax(ends - begins))
    return start, int(begins[longest]), int(ends[longest]), stop
