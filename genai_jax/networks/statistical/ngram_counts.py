"""Counts of n-grams: which token followed which, in tables of distinct n-grams; on the host."""

from typing import NamedTuple

import numpy as np

MERGE_ROWS = 1 << 20  # rows that wait until they are merged into the table


class Level(NamedTuple):
    """The distinct n-grams of one order, sorted by context, then by word.

    Attributes:
      contexts: [entries, order - 1] int32, the most recent token first.
      words: [entries] int32.
      raw: how often each occurs, [entries] int64.
      shorter: index of the same n-gram without its oldest token, at the level below, [entries]
        int64; empty at the first level.
      continuations: number of different tokens that precede it, [entries] int64; `raw` at the last
        level, and where the n-gram begins a document, since nothing precedes it (Heafield et al.
        2013, "Scalable Modified Kneser-Ney Language Model Estimation", section 3.2).
    """

    contexts: np.ndarray
    words: np.ndarray
    raw: np.ndarray
    shorter: np.ndarray
    continuations: np.ndarray


class Counter:
    """Collects n-grams from packed batches.

    Args:
      order: length of the longest n-grams, at least 1.
      vocab_size: number of tokens; it stands for "nothing" in contexts that are cut.
    """

    def __init__(self, order: int, vocab_size: int):
        self.order, self._nothing = order, vocab_size
        self._rows = np.zeros((0, order), np.int32)
        self._counts = np.zeros(0, np.int64)
        self._waiting: list[np.ndarray] = []

    def add(self, tokens: np.ndarray, targets: np.ndarray, positions: np.ndarray, counted):
        """Adds the n-grams that end with a target; all arguments are [rows, length].

        Args:
          tokens: inputs, each followed by its target.
          targets: the tokens that follow.
          positions: of the inputs within their segment, from 0.
          counted: whether a target counts.
        """
        contexts = contexts_of(tokens, positions, self.order - 1, self._nothing)
        rows = np.concatenate([contexts, np.asarray(targets)[..., None]], -1)
        self._waiting.append(rows[np.asarray(counted) > 0].astype(np.int32))
        if sum(map(len, self._waiting)) >= MERGE_ROWS:
            self._merge()

    def levels(self, boundary: int) -> list[Level]:
        """The n-grams of order 1, 2, ..., `order`; `boundary` is the token before a document."""
        self._merge()
        rows, counts = self._rows, self._counts
        levels, of_rows = [], np.zeros(0)  # `of_rows`: the entry below to which each row belongs
        for length in range(self.order):
            there = np.ones(len(rows), bool)
            if length:
                there = rows[:, length - 1] != self._nothing
            cut = np.concatenate([rows[there, :length], rows[there, -1:]], 1)
            first, group = _groups(cut)
            entries = cut[first]
            raw = np.bincount(group, counts[there], len(first)).astype(np.int64)
            shorter = of_rows[there][first] if length else np.zeros(0, np.int64)
            levels.append(Level(entries[:, :-1], entries[:, -1], raw, shorter, raw))
            of_rows = np.full(len(rows), -1, np.int64)
            of_rows[there] = group
        for i in range(self.order - 1):
            level = levels[i]
            counted = np.bincount(levels[i + 1].shorter, minlength=len(level.raw))
            if i:
                begins = level.contexts[:, -1] == boundary
                counted = np.where(begins, level.raw, counted)
            levels[i] = level._replace(continuations=counted)
        return levels

    def _merge(self):
        if not self._waiting:
            return
        ones = [np.ones(len(rows), np.int64) for rows in self._waiting]
        rows = np.concatenate([self._rows, *self._waiting])
        counts = np.concatenate([self._counts, *ones])
        first, group = _groups(rows)
        self._rows = rows[first]
        self._counts = np.bincount(group, counts, len(first)).astype(np.int64)
        self._waiting = []


def contexts_of(tokens, positions, length: int, nothing: int):
    """The last tokens up to each position, [rows, length of a row, length], most recent first.

    `nothing` stands where the segment has not so many. Takes arrays of numpy or jax [rows, n].
    """
    xp = tokens.__array_namespace__()
    columns = [
        xp.where(positions >= back, xp.roll(tokens, back, 1), nothing) for back in range(length)
    ]
    return xp.stack(columns, -1) if columns else xp.zeros((*tokens.shape, 0), tokens.dtype)


def _groups(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct rows in lexicographic order: index of the first of each, and the group of each row.

    Both int64; `rows[first]` are the distinct rows.
    """
    order = np.lexsort(rows.T[::-1])
    ordered = rows[order]
    new = np.ones(len(rows), bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(1)
    group = np.empty(len(rows), np.int64)
    group[order] = np.cumsum(new) - 1
    return order[new], group
