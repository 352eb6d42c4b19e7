"""From a process's own rows in host memory to global arrays on the devices."""

import collections
from collections.abc import Iterator
from typing import Any

import jax


def to_devices(batch: dict, shardings: dict) -> dict[str, jax.Array]:
    """Global arrays out of the rows that this process made."""
    return {
        name: jax.make_array_from_process_local_data(shardings[name], rows)
        for name, rows in batch.items()
    }


class DeviceBatches:
    """Keeps the next batch on its way to the devices while a step runs."""

    def __init__(self, source: Any, shardings: dict, ahead: int = 1):
        self._source, self._shardings, self._ahead = source, shardings, ahead
        self._queue = collections.deque()  # (batch on the devices, state of the source after it)
        self._state = source.get_state()

    def __iter__(self) -> Iterator[dict]:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        while len(self._queue) <= self._ahead:
            rows = next(self._source)
            self._queue.append((to_devices(rows, self._shardings), self._source.get_state()))
        batch, self._state = self._queue.popleft()
        return batch

    def get_state(self) -> dict:
        """State of the source after the last batch that was handed out."""
        return self._state
