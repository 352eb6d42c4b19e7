"""Prefetches batches in a background thread.

Kept apart from the loaders so that reading their flags does not import Grain.
"""

import weakref
from typing import Protocol

import grain

from genai_jax.data.text.packing import Batch


class BatchMaker(Protocol):
    """What produces batches: a packer of text or a shuffler of images."""

    def next_batch(self) -> Batch | None: ...

    def get_state(self) -> dict: ...

    def set_state(self, state: dict) -> None: ...


class BatchIterator:
    """Iterates over the batches of a maker, prefetching some of them.

    Grain stores the state with each batch, so `get_state` returns the state after the last batch
    handed out, however far ahead the thread is.

    Args:
      maker: produces the batches; the iterator owns it from here on.
      buffer_size: how many batches to prefetch; 0 disables prefetching and starts no thread.
    """

    def __init__(self, maker: BatchMaker, buffer_size: int):
        dataset = grain.experimental.ThreadPrefetchIterDataset(
            _MakerDataset(maker), prefetch_buffer_size=buffer_size
        )
        self._inner = [iter(dataset)]
        # Grain's own cleanup fails if it runs as late as interpreter shutdown.
        self._finalizer = weakref.finalize(self, _close, self._inner)

    def __iter__(self) -> "BatchIterator":
        return self

    def __next__(self) -> Batch:
        return next(self._open())

    def get_state(self) -> dict:
        """The position after the last batch handed out, JSON-serializable."""
        return self._open().get_state()

    def set_state(self, state: dict) -> None:
        """Continues from `state`.

        Raises:
          ConfigError: the state does not cover the rows of this iterator.
        """
        self._open().set_state(state)

    def close(self) -> None:
        """Stops the thread."""
        self._finalizer()

    def _open(self) -> grain.DatasetIterator:
        if not self._inner:
            raise ValueError("the batch iterator is closed")
        return self._inner[0]


def _close(inner: list[grain.DatasetIterator]) -> None:
    inner[0].close()
    inner.clear()


class _MakerDataset(grain.IterDataset):
    def __init__(self, maker: BatchMaker):
        super().__init__()
        self._maker = maker

    def __iter__(self) -> grain.DatasetIterator:
        return _MakerIterator(self._maker)


class _MakerIterator(grain.DatasetIterator):
    def __init__(self, maker: BatchMaker):
        super().__init__()
        self._maker = maker

    def __next__(self) -> Batch:
        batch = self._maker.next_batch()
        if batch is None:
            raise StopIteration
        return batch

    def get_state(self) -> dict:
        return self._maker.get_state()

    def set_state(self, state: dict) -> None:
        self._maker.set_state(state)
