"""Batches of pairs of texts, several in a row; a pair is never cut."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from genai_jax.config import ConfigError
from genai_jax.data.kept import KeptData
from genai_jax.data.text.byte_counts import closed
from genai_jax.data.text.loader import DataConfig, TextLoader
from genai_jax.data.text.packing import Batch, Packer
from genai_jax.data.text.pair_documents import texts_of
from genai_jax.data.text.pairs import open_pairs
from genai_jax.data.text.source_target import Lengths, Place, put
from genai_jax.data.text.sources import Source, encode_document
from genai_jax.data.text.tokenization import Tokenizer

_CHECKED_BYTES = 64 * 2**20  # pairs up to this size are tokenized once beforehand


class PairIds(NamedTuple):
    """Ids of a pair, each with the boundary last; the target's bytes if they depend on the text."""

    source: np.ndarray
    target: np.ndarray
    sizes: np.ndarray | None = None

    def fits(self, at: Place, lengths: Lengths) -> bool:
        return (
            at.source + len(self.source) <= lengths.source
            and at.target + len(self.target) <= lengths.target
        )


class PairPacker(Packer):
    """Fills rows with the pairs that come next, as many as fit; see `Packer`.

    Args:
      get_pair: ordinal -> `PairIds`, or None if there are no more.
      rows, batch_size, sizes: as for `Packer`.
      lengths: of the rows.
      start: what the decoder reads first.
    """

    def __init__(
        self,
        get_pair: Callable[[int], PairIds | None],
        rows: Sequence[int],
        batch_size: int,
        lengths: Lengths,
        start: int,
        sizes: bool,
    ):
        super().__init__(get_pair, rows, batch_size, lengths.target, sizes=sizes)
        self._lengths, self._start = lengths, start

    def blank(self, rows: int) -> Batch:
        row = self._lengths.blank(self._sizes)
        return {name: np.stack([array] * rows) for name, array in row.items()}

    def _fill(self, index: int, row: dict[str, np.ndarray]) -> None:
        at = Place()
        while (pair := self._document(index)) is not None and pair.fits(at, self._lengths):
            if pair.sizes is not None:
                row["target_bytes"][at.target : at.target + len(pair.target)] = pair.sizes
            at = put(row, at, pair.source, pair.target, self._start)
            self._cursors[index] = (self._cursors[index][0] + 1, 0)
            self._current[index] = None
        if pair is not None and at == Place():
            raise too_long(len(pair.source), len(pair.target), self._lengths)


class PairLoader(TextLoader):
    """`TextLoader` for pairs.

    Args:
      config, seed, kept: as for `TextLoader`.
      target_length: tokens of a row of targets; those of sources are `config.sequence_length`.
    """

    def __init__(self, config: DataConfig, seed: int, kept: KeptData | None, target_length: int):
        super().__init__(config, seed, kept)
        self._lengths = Lengths(config.sequence_length, target_length)

    def _source(self, split: str) -> Source:
        return open_pairs(self.config, split, self._opened)

    def _tokenized(self, source: Source, split: str) -> "TokenizedPairs":
        pairs = TokenizedPairs(source, self.tokenizer)
        if source.size_bytes is not None and source.size_bytes <= _CHECKED_BYTES:
            longest = [max(len(pairs[i][side]) for i in range(len(pairs))) for side in (0, 1)]
            if longest[0] > self._lengths.source or longest[1] > self._lengths.target:
                raise too_long(*longest, self._lengths)
        return pairs

    def _packer(self, get_document, rows: Sequence[int], split: str, rearrange=None) -> Packer:
        sizes = self.tokenizer.token_bytes() is None
        return PairPacker(
            get_document, rows, self.config.batch_size, self._lengths, self.tokenizer.boundary_id,
            sizes,
        )  # fmt: skip

    def _evaluation_length(self, documents: "TokenizedPairs", row: int, limit: int) -> int:
        count, at = 0, Place()
        for ordinal in range(row, len(documents), self.config.batch_size):
            pair = documents[ordinal]
            if not count or not pair.fits(at, self._lengths):
                count, at = count + 1, Place()
            at = Place(at.source + len(pair.source), at.target + len(pair.target))
        return count if limit < 0 else min(count, limit)


class TokenizedPairs:
    """The pairs of a source as ids."""

    def __init__(self, source: Source, tokenizer: Tokenizer):
        self.source, self._tokenizer = source, tokenizer
        self.sizes = tokenizer.token_bytes() is None
        small = source.size_bytes is not None and source.size_bytes <= _CHECKED_BYTES
        self._read = functools.cache(self._encode) if small else self._encode

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> PairIds:
        return self._read(int(index))

    def _encode(self, index: int) -> PairIds:
        source, target = texts_of(self.source[index])
        end = [self._tokenizer.boundary_id]
        ids = np.concatenate([self._tokenizer.encode(source), end]).astype(np.int32)
        if not self.sizes:
            target_ids = np.concatenate([self._tokenizer.encode(target), end]).astype(np.int32)
            return PairIds(ids, target_ids)
        target_ids, sizes = self._tokenizer.encode_with_sizes(target)
        sizes = closed(np.pad(sizes, (0, 1)), len(encode_document(target)))
        return PairIds(ids, np.append(target_ids, end).astype(np.int32), sizes)


def too_long(source: int, target: int, lengths: Lengths) -> Any:
    """The error that pairs of so many tokens do not fit."""
    return ConfigError(
        f"pairs have up to {source} tokens in the source and {target} in the target, ends "
        f"included, more than --data.sequence_length={lengths.source} or "
        f"--sequence_to_sequence.target_length={lengths.target} allows: raise these, or leave out "
        "such pairs"
    )
