"""Packs documents into rows of a fixed length, every token predicted exactly once.

Row r of the global batch reads the documents r, r + batch_size, r + 2 batch_size, ... of one order
that all processes share (a document here may be a passage of a longer one). A document is
``x = [boundary, tokens..., boundary]``, with inputs ``x[:-1]`` and targets ``x[1:]``. What does not
fit into a row goes on in the same row of the next batch, as a new segment with positions from 0,
for its context is gone. Where only some targets count, those of answers, a document is not cut,
since an answer means nothing without its question: the rest of the row is padding.
"""

from collections.abc import Callable, Sequence

import numpy as np

from genai_jax.config import ConfigError

Batch = dict[str, np.ndarray]


class Packer:
    """Fills batches; what it still has to do is two integers a row.

    Args:
      get_document: ordinal in the global order -> ids with both boundaries ``[length]``, or None if
        there are no more documents.
      rows: which rows of the global batch to fill.
      batch_size: rows of the global batch.
      length: tokens in a row.
      counted: ids of a document -> which of them count as targets, ``[length]``; None for all.
    """

    def __init__(
        self,
        get_document: Callable[[int], np.ndarray | None],
        rows: Sequence[int],
        batch_size: int,
        length: int,
        counted: Callable[[np.ndarray], np.ndarray] | None = None,
    ):
        self._get_document = get_document
        self._rows = list(rows)
        self._batch_size = batch_size
        self._length = length
        self._counted = counted
        self._cursors = [(0, 0) for _ in self._rows]  # documents finished, tokens into the next
        self._current: list[np.ndarray | None] = [None] * len(self._rows)

    def next_batch(self) -> Batch | None:
        """The next batch, or None when all of its rows are at their end.

        Returns:
          Arrays ``[rows, length]``: tokens, targets, segment_ids (from 1; 0 is padding) and
          positions, all int32, and loss_mask, float32 (1 where a target counts).
        """
        batch = padding(len(self._rows), self._length)
        for index in range(len(self._rows)):
            self._fill(index, {name: array[index] for name, array in batch.items()})
        if not batch["segment_ids"].any():
            return None
        return batch

    def get_state(self) -> dict:
        """Where the rows are, JSON serialisable: row -> its cursor."""
        pairs = zip(self._rows, self._cursors, strict=True)
        return {"cursors": {str(row): list(cursor) for row, cursor in pairs}}

    def set_state(self, state: dict) -> None:
        """Goes on from a state that has these rows among others.

        Raises:
          ConfigError: some of them are missing, or it is of another batch size.
        """
        cursors = state["cursors"]
        rows = sorted(map(int, cursors))
        if not set(self._rows) <= set(rows) or rows[-1] >= self._batch_size:
            raise ConfigError(
                f"the saved data position is that of batch rows {_span(rows)}, but this process "
                f"fills rows {_span(self._rows)} of {self._batch_size}: resume with the same batch "
                "size"
            )
        mine = (cursors[str(row)] for row in self._rows)
        self._cursors = [(int(finished), int(offset)) for finished, offset in mine]
        self._current = [None] * len(self._rows)

    def _fill(self, index: int, row: dict[str, np.ndarray]) -> None:
        start, segment = 0, 1
        while start < self._length:
            document = self._document(index)
            if document is None:
                return
            finished, offset = self._cursors[index]
            left = len(document) - 1 - offset
            size = min(left, self._length - start)
            if self._counted and size < left:
                if start:
                    return
                raise ConfigError(
                    f"a question with its answer has {left} tokens and does not fit into "
                    f"--data.sequence_length={self._length}"
                )
            stop = start + size
            row["tokens"][start:stop] = document[offset : offset + size]
            row["targets"][start:stop] = document[offset + 1 : offset + 1 + size]
            row["segment_ids"][start:stop] = segment
            row["positions"][start:stop] = np.arange(size)
            row["loss_mask"][start:stop] = self._counted(document)[1:] if self._counted else 1
            if size == left:
                self._cursors[index] = (finished + 1, 0)
                self._current[index] = None
            else:
                self._cursors[index] = (finished, offset + size)
            start, segment = stop, segment + 1

    def _document(self, index: int) -> np.ndarray | None:
        if self._current[index] is None:
            finished, _ = self._cursors[index]
            ordinal = self._rows[index] + finished * self._batch_size
            self._current[index] = self._get_document(ordinal)
        return self._current[index]


def padding(rows: int, length: int) -> Batch:
    """A batch without tokens, as `Packer.next_batch` describes it."""
    names = ("tokens", "targets", "segment_ids", "positions")
    batch = {name: np.zeros((rows, length), np.int32) for name in names}
    return batch | {"loss_mask": np.zeros((rows, length), np.float32)}


def _span(rows: Sequence[int]) -> str:
    return f"{rows[0]} to {rows[-1]}" if rows else "none"
