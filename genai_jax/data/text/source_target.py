"""Rows of sources and targets from packed rows of text: what an encoder-decoder learns from.

A row has the arrays ``source_tokens`` and ``source_segment_ids`` [source length], and those of
packed text for the targets, [target length]: tokens (what the decoder reads: each target after the
one before it), targets, segment_ids, positions, and loss_mask. A target belongs to the source of
its own segment; 0 is padding.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Row = dict[str, np.ndarray]
# Ids of a text, randomness -> its source and its target.
Corrupt = Callable[[np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]


class Lengths(NamedTuple):
    """Tokens of the two rows."""

    source: int
    target: int

    def blank(self, sizes: bool = False) -> Row:
        """A row without tokens."""
        names = ["tokens", "targets", "segment_ids", "positions"] + ["target_bytes"] * sizes
        row = {name: np.zeros(self.target, np.int32) for name in names}
        row["loss_mask"] = np.zeros(self.target, np.float32)
        names = ("source_tokens", "source_segment_ids")
        return row | {name: np.zeros(self.source, np.int32) for name in names}


class Place(NamedTuple):
    """Where the next pair of a row begins."""

    source: int = 0
    target: int = 0
    segment: int = 1


def put(row: Row, at: Place, source: np.ndarray, target: np.ndarray, first: int) -> Place:
    """Writes a pair into a row, and returns where the next one begins.

    Args:
      row: what is changed; it has room for the pair.
      at: where the pair begins.
      source: ids.
      target: ids.
      first: what the decoder reads before the first target.
    """
    source_end, end = at.source + len(source), at.target + len(target)
    row["source_tokens"][at.source : source_end] = source
    row["source_segment_ids"][at.source : source_end] = at.segment
    row["tokens"][at.target : end] = [first, *target[:-1]]
    row["targets"][at.target : end] = target
    row["segment_ids"][at.target : end] = at.segment
    row["positions"][at.target : end] = np.arange(len(target))
    row["loss_mask"][at.target : end] = 1
    return Place(source_end, end, at.segment + 1)


class Corruption(NamedTuple):
    """One pair from the whole text of a row: its documents, one after the other.

    Attributes:
      corrupt: makes the pair.
      lengths: of the rows.
      start: what the decoder reads first.
      seed: of the randomness.
    """

    corrupt: Corrupt
    lengths: Lengths
    start: int
    seed: tuple[int, ...]

    def __call__(self, packed: Row, place: tuple[int, ...]) -> Row:
        """See `packing.Packer`: the place of the row identifies its randomness."""
        row, ids = self.lengths.blank(), packed["targets"][packed["segment_ids"] > 0]
        if len(ids):
            pair = self.corrupt(ids, np.random.default_rng((*self.seed, *place)))
            put(row, Place(), *pair, self.start)
        return row


class Halves(NamedTuple):
    """The first half of each document in a row, given nothing, and the second, given the first.

    All targets of the packed row stay, in their order and once each, so that the loss is the
    likelihood of the text, each token given what precedes it in its document.
    """

    lengths: Lengths

    def __call__(self, packed: Row, place: tuple[int, ...]) -> Row:
        """See `packing.Packer`; nothing is random."""
        del place
        row = self.lengths.blank() | packed
        segments, at, written = packed["segment_ids"], 0, 0
        row["segment_ids"], row["positions"] = (np.zeros_like(segments) for _ in range(2))
        for segment in range(1, segments.max(initial=0) + 1):
            length = int(np.sum(segments == segment))
            half, end = length // 2, at + length
            row["segment_ids"][at : at + half] = 2 * segment - 1
            row["segment_ids"][at + half : end] = 2 * segment
            row["positions"][at:end] = [*range(half), *range(length - half)]
            row["source_tokens"][written : written + half] = packed["targets"][at : at + half]
            row["source_segment_ids"][written : written + half] = 2 * segment
            at, written = end, written + half
        return row
