"""Makes batches ahead in a thread. Apart from the loader, so that its flags do not import Grain."""

import weakref
from typing import Protocol

import grain

from genai_jax.data.text.packing import Batch


class Maker(Protocol):
    """What makes batches: a packer of text, a shuffler of images."""

    def next_batch(self) -> Batch | None: ...

    def get_state(self) -> dict: ...

    def set_state(self, state: dict) -> None: ...


class BatchIterator:
    """The batches of a maker, some of them made ahead.

    Grain keeps the state of every batch beside it, so `get_state` is that of the last batch handed
    out, whatever the thread has made since.

    Args:
      maker: makes the batches; belongs to the iterator from here on.
      buffer_size: how many batches to make ahead; 0 for none, and no thread.
    """

    def __init__(self, maker: Maker, buffer_size: int):
        dataset = grain.experimental.ThreadPrefetchIterDataset(
            _Made(maker), prefetch_buffer_size=buffer_size
        )
        self._inner = [iter(dataset)]
        # Grain's own clean-up fails when it runs as late as the end of the interpreter.
        self._finalizer = weakref.finalize(self, _close, self._inner)

    def __iter__(self) -> "BatchIterator":
        return self

    def __next__(self) -> Batch:
        return next(self._open())

    def get_state(self) -> dict:
        """The position after the last batch handed out, JSON serialisable."""
        return self._open().get_state()

    def set_state(self, state: dict) -> None:
        """Goes on from `state`; ConfigError if it is that of other rows."""
        self._open().set_state(state)

    def close(self) -> None:
        """Ends the thread."""
        self._finalizer()

    def _open(self) -> grain.DatasetIterator:
        if not self._inner:
            raise ValueError("the batch iterator is closed")
        return self._inner[0]


def _close(inner: list[grain.DatasetIterator]) -> None:
    inner[0].close()
    inner.clear()


class _Made(grain.IterDataset):
    def __init__(self, maker: Maker):
        super().__init__()
        self._maker = maker

    def __iter__(self) -> grain.DatasetIterator:
        return _MadeIterator(self._maker)


class _MadeIterator(grain.DatasetIterator):
    def __init__(self, maker: Maker):
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
