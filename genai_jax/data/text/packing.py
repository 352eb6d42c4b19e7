"""Packs documents into rows of a fixed length, predicting every token exactly once.

Row r of the global batch reads the documents r, r + batch_size, r + 2 batch_size, ... in an order
shared by all processes (a document here may be a passage of a longer one). A document is
``x = [boundary, tokens..., boundary]``, with inputs ``x[:-1]`` and targets ``x[1:]``. What does not
fit into a row continues in the same row of the next batch, as a new segment with positions from 0,
since its context is gone. If only the targets of answers count, documents are never cut, since an
answer means nothing without its question: the rest of the row is padding.
"""

from collections.abc import Callable, Sequence

import numpy as np

from genai_jax.config import ConfigError

Batch = dict[str, np.ndarray]


class Packer:
    """Fills batches; its state is two integers per row.

    Args:
      get_document: ordinal in the global order -> ids with both boundaries ``[length]``, or None if
        there are no more documents. With `sizes`, ``[length, 2]``: ids and their bytes.
      rows: which rows of the global batch to fill.
      batch_size: number of rows in the global batch.
      length: tokens per row.
      counted: ids of a document -> mask of those that count as targets, ``[length]``; None for all.
      sizes: whether batches have an entry ``target_bytes``.
      rearrange: (ids of what a row takes of a document, (document, offset)) -> the same, or with
        `added` further tokens; None to leave them.
      added: ids -> how many tokens `rearrange` adds to them at most; needed with it.
      rewrite: (arrays of a row, where it begins: (row, documents finished, tokens into the next))
        -> other arrays in their place; None to leave them.
    """

    def __init__(
        self,
        get_document: Callable[[int], np.ndarray | None],
        rows: Sequence[int],
        batch_size: int,
        length: int,
        counted: Callable[[np.ndarray], np.ndarray] | None = None,
        sizes: bool = False,
        rearrange: Callable[[np.ndarray, tuple[int, int]], np.ndarray] | None = None,
        added: Callable[[np.ndarray], int] | None = None,
        rewrite: Callable[[dict[str, np.ndarray], tuple[int, int, int]], Batch] | None = None,
        flag: str = "sequence_length",
    ):
        self._flag = flag
        self._rewrite = rewrite
        self._rearrange, self._added = rearrange, added
        self._get_document = get_document
        self._rows = list(rows)
        self._batch_size = batch_size
        self._length = length
        self._counted, self._sizes = counted, sizes
        self._cursors = [(0, 0) for _ in self._rows]  # documents finished, tokens into the next
        self._current: list[np.ndarray | None] = [None] * len(self._rows)

    def next_batch(self) -> Batch | None:
        """The next batch, or None when all of its rows have run out of documents.

        Returns:
          Arrays ``[rows, length]``: tokens, targets, segment_ids (from 1; 0 is padding) and
          positions, all int32, and loss_mask, float32 (1 where a target counts); with `sizes`,
          target_bytes, int32. With `rewrite`, what that returns.
        """
        batch = self.blank(len(self._rows))
        places = [(row, *cursor) for row, cursor in zip(self._rows, self._cursors, strict=True)]
        for index in range(len(self._rows)):
            self._fill(index, {name: array[index] for name, array in batch.items()})
        if not batch["segment_ids"].any():
            return None
        return self._rewritten(batch, places)

    def blank(self, rows: int) -> Batch:
        """Rows without tokens, before they are filled and rewritten."""
        return padding(rows, self._length, self._sizes)

    def padding(self, rows: int) -> Batch:
        """A batch without tokens."""
        return self._rewritten(self.blank(rows), [(0, 0, 0)] * rows)

    def _rewritten(self, batch: Batch, places: Sequence[tuple[int, int, int]]) -> Batch:
        if self._rewrite is None:
            return batch
        rows = [
            self._rewrite({name: array[i] for name, array in batch.items()}, place)
            for i, place in enumerate(places)
        ]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def get_state(self) -> dict:
        """The cursor of each row, JSON-serializable."""
        pairs = zip(self._rows, self._cursors, strict=True)
        return {"cursors": {str(row): list(cursor) for row, cursor in pairs}}

    def set_state(self, state: dict) -> None:
        """Continues from a state that covers at least these rows.

        Raises:
          ConfigError: some of these rows are missing, or the batch size is a different one.
        """
        cursors = state["cursors"]
        rows = sorted(map(int, cursors))
        if not set(self._rows) <= set(rows) or rows[-1] >= self._batch_size:
            raise ConfigError(
                f"the saved data position covers batch rows {_span(rows)}, but this process fills "
                f"rows {_span(self._rows)} of {self._batch_size}: resume with the same batch size"
            )
        own_cursors = (cursors[str(row)] for row in self._rows)
        self._cursors = [(int(finished), int(offset)) for finished, offset in own_cursors]
        self._current = [None] * len(self._rows)

    def _fill(self, index: int, row: dict[str, np.ndarray]) -> None:
        start, segment = 0, 1
        while start < self._length:
            document = self._document(index)
            if document is None:
                return
            finished, offset = self._cursors[index]
            remaining = len(document) - 1 - offset
            size = min(remaining, self._length - start)
            if self._counted and size < remaining:
                if start:
                    return
                raise ConfigError(
                    f"a question with its answer has {remaining} tokens and does not fit into "
                    f"--data.{self._flag}={self._length}"
                )
            taken = document[offset : offset + size + 1]
            if self._rearrange and (fits := self._fitting(document[offset:], self._length - start)):
                size = fits
                place = (self._rows[index] + finished * self._batch_size, offset)
                taken = self._rearrange(document[offset : offset + size + 1], place)
            stop = start + len(taken) - 1
            ids = taken[:, 0] if self._sizes else taken
            row["tokens"][start:stop] = ids[:-1]
            row["targets"][start:stop] = ids[1:]
            if self._sizes:
                row["target_bytes"][start:stop] = taken[1:, 1]
            row["segment_ids"][start:stop] = segment
            row["positions"][start:stop] = np.arange(stop - start)
            row["loss_mask"][start:stop] = self._counted(ids)[1:] if self._counted else 1
            if size == remaining:
                self._cursors[index] = (finished + 1, 0)
                self._current[index] = None
            else:
                self._cursors[index] = (finished, offset + size)
            start, segment = stop, segment + 1

    def _fitting(self, rest: np.ndarray, room: int) -> int:
        """How many tokens after the first fit into a row when they are rearranged; 0 if none do."""
        if len(rest) - 1 + self._added(rest) <= room:
            return len(rest) - 1
        size = max(min(len(rest) - 2, room - self._added(rest[:1])), 0)  # of a text that is cut
        return size if size + self._added(rest[: size + 1]) <= room else 0

    def _document(self, index: int) -> np.ndarray | None:
        if self._current[index] is None:
            finished, _ = self._cursors[index]
            ordinal = self._rows[index] + finished * self._batch_size
            self._current[index] = self._get_document(ordinal)
        return self._current[index]


def padding(rows: int, length: int, sizes: bool = False) -> Batch:
    """A batch without tokens, in the format of `Packer.next_batch`."""
    names = ["tokens", "targets", "segment_ids", "positions"] + ["target_bytes"] * sizes
    batch = {name: np.zeros((rows, length), np.int32) for name in names}
    return batch | {"loss_mask": np.zeros((rows, length), np.float32)}


def _span(rows: Sequence[int]) -> str:
    return f"{rows[0]} to {rows[-1]}" if rows else "none"
