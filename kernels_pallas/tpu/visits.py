"""The blocks of scores that a mask does not skip, in the order in which a kernel visits them.

A kernel's grid is one flat list of (query block, key block) pairs, so skipped blocks cost nothing,
not even a grid step. Inside a block, each run of `sub_q` queries has its own range of keys, and the
ranges of one block are its *pattern*. Few patterns occur (a causal mask on square blocks has two),
and a kernel has one specialized body for each: full blocks need no comparison, and diagonal blocks
multiply little more than what is visible. The lists are only as long as the number of visited
blocks; no array grows with q_length * kv_length.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..masks import Mask

LANES = 128  # of a vector register
FIRST, LAST = 1, 2  # bits of `Visits.flags`; the pattern's index is shifted left by PATTERN_SHIFT
PATTERN_SHIFT = 2
MAX_PATTERNS = 4  # bodies a kernel may hold; rarer patterns share the most general one
KEY_STEP = 256  # key ranges of a pattern start and stop at multiples of this


@dataclass(frozen=True)
class Blocks:
    """Block sizes of a kernel: queries and keys per grid step, queries per run.

    ahead: whether full blocks start the scores of a run before the softmax of the previous run
    (other blocks always do): more registers for fewer waits, which pays on v6e and 7x.
    """

    q: int
    k: int
    sub_q: int
    ahead: bool = False

    def __post_init__(self):
        if self.q % self.sub_q or self.k % LANES or min(self.q, self.k, self.sub_q) < 1:
            raise ValueError(
                f"blocks {self.q}x{self.k} with runs of {self.sub_q}; allowed: q a multiple of "
                f"sub_q, k one of {LANES}"
            )


class Piece(NamedTuple):
    """The keys [start, stop) of a key block, for one run of queries."""

    start: int
    stop: int
    compare: bool  # False: every pair is visible


class Run(NamedTuple):
    """The keys [start, stop) of a key block that one run of `sub_q` queries uses, of which those in
    [clear_start, clear_stop) are visible to all of the queries."""

    start: int
    stop: int
    clear_start: int
    clear_stop: int

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The keys in order, split where comparison begins and ends."""
        cuts = (
            Piece(self.start, self.clear_start, True),
            Piece(self.clear_start, self.clear_stop, False),
            Piece(self.clear_stop, self.stop, True),
        )
        return tuple(piece for piece in cuts if piece.start < piece.stop)

    @property
    def compare(self) -> bool:
        """Whether any pair may be invisible."""
        return (self.clear_start, self.clear_stop) != (self.start, self.stop)


NOTHING = Run(0, 0, 0, 0)
Pattern = tuple[Run, ...]


class Visits(NamedTuple):
    """The visited blocks: query blocks in order, all key blocks of a query block together."""

    q_block: np.ndarray  # [steps] int32
    k_block: np.ndarray  # [steps] int32
    flags: np.ndarray  # [steps] int32: FIRST and LAST of a query block, and the pattern's index
    patterns: tuple[Pattern, ...]

    @property
    def runs(self) -> int:
        """Number of computed tiles (run x KEY_STEP keys): the work, for any block sizes."""
        return sum(
            -(-(run.stop - run.start) // KEY_STEP)
            for flag in self.flags
            for run in self.patterns[flag >> PATTERN_SHIFT]
        )


@functools.lru_cache(maxsize=256)
def visits(
    mask: Mask,
    blocks: Blocks,
    q_length: int,
    kv_length: int,
    q_offset: int | None = 0,
    k_start: int = 0,
    k_stop: int | None = None,
) -> Visits:
    """The visits of q_length queries to the keys [k_start, k_stop) of kv_length.

    q_offset is the position of query 0; None if it is known only at run time, in which case every
    block is visited and compared. Key blocks count from k_start. Every query block is visited at
    least once, so that its output is written.
    """
    k_stop = kv_length if k_stop is None else k_stop
    steps = []
    for i in range(-(-q_length // blocks.q)):
        row = list(_row(mask, blocks, i * blocks.q, q_offset, k_start, k_stop))
        if not row:
            row = [(0, (NOTHING,) * (blocks.q // blocks.sub_q))]
        for j, (k_block, pattern) in enumerate(row):
            steps.append((i, k_block, FIRST * (j == 0) + LAST * (j == len(row) - 1), pattern))
    patterns, index = _bodies([pattern for *_, pattern in steps], blocks)
    flags = [flag + (index[pattern] << PATTERN_SHIFT) for *_, flag, pattern in steps]
    columns = ([i for i, *_ in steps], [k for _, k, *_ in steps], flags)
    return Visits(*(np.asarray(column, np.int32) for column in columns), patterns)


def _row(mask, blocks, first_query, q_offset, k_start, k_stop):
    """(key block, pattern) for each key block that the query block at first_query needs."""
    count = -(-(k_stop - k_start) // blocks.k)
    lowest, highest = 0, count
    if q_offset is not None:
        q_start = first_query + q_offset
        start, stop = mask.key_range(q_start, q_start + blocks.q, k_stop)
        lowest = max(start - k_start, 0) // blocks.k
        highest = max(-(-(stop - k_start) // blocks.k), lowest)
    for j in range(lowest, highest):
        block_start = k_start + j * blocks.k
        runs = tuple(
            _run(mask, blocks, first_query + r, q_offset, block_start, k_stop)
            for r in range(0, blocks.q, blocks.sub_q)
        )
        if any(run.stop > run.start for run in runs):
            yield j, runs


def _run(mask, blocks, query, q_offset, block_start, k_stop) -> Run:
    """The keys of the block at block_start that the run of queries at `query` needs."""
    if q_offset is None:
        return _compared(blocks)
    q_start = query + q_offset
    q_stop = q_start + blocks.sub_q
    start, stop = mask.key_range(q_start, q_stop, k_stop)
    start, stop = max(start, block_start), min(stop, block_start + blocks.k)
    if start >= stop:
        return NOTHING
    step = math.gcd(KEY_STEP, blocks.k)
    start = (start - block_start) // step * step
    stop = -(-(stop - block_start) // step) * step

    def clear(key):
        first, last = block_start + key, block_start + key + step
        return last <= k_stop and mask.block_kind(q_start, q_stop, first, last) == "full"

    clear_start = next((key for key in range(start, stop, step) if clear(key)), stop)
    clear_stop = next((key for key in range(clear_start, stop, step) if not clear(key)), stop)
    return Run(start, stop, clear_start, clear_stop)


def _compared(blocks: Blocks) -> Run:
    """All keys, all of them compared."""
    return Run(0, blocks.k, blocks.k, blocks.k)


def _bodies(patterns: list[Pattern], blocks: Blocks) -> tuple[tuple[Pattern, ...], dict]:
    """(the patterns that get a body, {pattern: index of the body that handles it})."""
    ranked = [pattern for pattern, _ in Counter(patterns).most_common()]
    if len(ranked) <= MAX_PATTERNS:
        kept = ranked
    else:
        everything = (_compared(blocks),) * (blocks.q // blocks.sub_q)
        kept = [p for p in ranked[: MAX_PATTERNS - 1] if p != everything] + [everything]
    return tuple(kept), {p: kept.index(p) if p in kept else len(kept) - 1 for p in ranked}
