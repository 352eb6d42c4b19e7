"""Batches for word vectors: words and those around them, or cells of a co-occurrence matrix."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from genai_jax.data.text.words import Corpus

Batch = dict[str, np.ndarray]


class Cells(NamedTuple):
    """The cells of a co-occurrence matrix that are not zero, by row, then by column.

    Attributes:
      rows: words, [cells] int32.
      columns: words of their contexts, [cells] int32.
      counts: how much each pair counts, [cells] float32.
    """

    rows: np.ndarray
    columns: np.ndarray
    counts: np.ndarray


def context_windows(
    corpus: Corpus, places: np.ndarray, window: int, radius: np.ndarray | None = None
) -> Batch:
    """Words at some places and the words around them within their documents.

    Args:
      corpus: the text.
      places: [n] indices of words.
      window: words on each side, at most.
      radius: [n], words on each side for each place; the window if None.

    Returns:
      word [n] int32; context [n, 2 window] int32, 0 where there is none; context_mask
      [n, 2 window] float32, 1 where there is one; mask [n] float32 of ones.
    """
    offsets = np.array([d for d in range(-window, window + 1) if d])
    around = places[:, None] + offsets
    within = np.clip(around, 0, len(corpus.ids) - 1)
    same = corpus.documents[within] == corpus.documents[places][:, None]
    there = (around == within) & same
    if radius is not None:
        there &= np.abs(offsets) <= radius[:, None]
    return {
        "word": corpus.ids[places],
        "context": np.where(there, corpus.ids[within], 0).astype(np.int32),
        "context_mask": there.astype(np.float32),
        "mask": np.ones(len(places), np.float32),
    }


def cooccurrences(corpus: Corpus, num_words: int, window: int) -> Cells:
    """Weighted counts of pairs of words of a document at most `window` words apart.

    Words that are d apart count 1 / d, and the matrix is symmetric (Pennington et al. 2014, "GloVe:
    Global vectors for word representation", section 4.2).
    """
    keys, weights = [np.zeros(0, np.int64)], [np.zeros(0)]
    ids = corpus.ids.astype(np.int64)
    for distance in range(1, window + 1):
        same = corpus.documents[distance:] == corpus.documents[:-distance]
        first, second = ids[:-distance][same], ids[distance:][same]
        pairs = np.concatenate([first * num_words + second, second * num_words + first])
        distinct, counts = np.unique(pairs, return_counts=True)
        keys.append(distinct)
        weights.append(counts / distance)
    distinct, place = np.unique(np.concatenate(keys), return_inverse=True)
    counts = np.bincount(place, np.concatenate(weights), len(distinct))
    rows, columns = np.divmod(distinct, num_words)
    return Cells(rows.astype(np.int32), columns.astype(np.int32), counts.astype(np.float32))


def cell_batch(cells: Cells, places: np.ndarray) -> Batch:
    """Some of the cells: word, context [n] int32, count [n] float32, mask [n] of ones."""
    return {
        "word": cells.rows[places],
        "context": cells.columns[places],
        "count": cells.counts[places],
        "mask": np.ones(len(places), np.float32),
    }


class Epochs:
    """An endless, checkpointable sequence of batches: pass after pass over places, shuffled.

    Args:
      open_pass: number of a pass -> (how many places it has, places [n] -> their batch).
      batch_size: rows of the global batch.
      rows: which of them to make.
      seed: of the order of the places.
    """

    def __init__(
        self,
        open_pass: Callable[[int], tuple[int, Callable[[np.ndarray], Batch]]],
        batch_size: int,
        rows: Sequence[int],
        seed: int,
    ):
        self._open_pass, self._batch_size = open_pass, batch_size
        self._rows, self._seed = np.array(rows, np.int64), seed
        self._epoch, self._batch, self._opened = 0, 0, None

    def next_batch(self) -> Batch:
        """The next batch; a pass drops the places that do not fill one more batch."""
        order, read = self._current()
        start = self._batch * self._batch_size
        places = order[(start + self._rows) % len(order)]
        self._batch += 1
        if start + 2 * self._batch_size > len(order):
            self._epoch, self._batch, self._opened = self._epoch + 1, 0, None
        return read(places)

    def get_state(self) -> dict:
        return {"epoch": self._epoch, "batch": self._batch}

    def set_state(self, state: dict) -> None:
        self._epoch, self._batch = int(state["epoch"]), int(state["batch"])
        self._opened = None

    def _current(self):
        if self._opened is None:
            size, read = self._open_pass(self._epoch)
            order = np.random.default_rng((self._seed, self._epoch, 0)).permutation(size)
            self._opened = order, read
        return self._opened


def padded_batches(
    read: Callable[[np.ndarray], Batch], size: int, batch_size: int, rows: Sequence[int]
):
    """One pass over `size` places in order; the last batch is filled up with rows of mask 0."""
    for start in range(0, size, batch_size):
        places = start + np.array(rows, np.int64)
        batch = read(np.minimum(places, size - 1))
        there = (places < size).astype(np.float32)
        masks = {name: batch[name] for name in ("mask", "context_mask") if name in batch}
        yield batch | {n: (x.T * there).T.astype(np.float32) for n, x in masks.items()}
