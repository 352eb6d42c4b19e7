"""From the rows that a process holds in host memory to global arrays on the devices."""

import collections
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from genai_jax.config import ConfigError
from genai_jax.training.distributed import gather_records
from genai_jax.training.validate import check_batch


class BatchPlacement:
    """Which rows of the global batch this process has to load, and how they get to its devices.

    Devices that split the length, or that replicate the batch, need the same rows as others, so
    several processes may load the same row, each for its own devices.

    Args:
      shapes: batch entry -> shape of the global array, its rows first.
      shardings: batch entry -> its sharding.

    Attributes:
      rows: indices of the rows that this process's devices need, in order.
    """

    def __init__(self, shapes: Mapping[str, Any], shardings: Mapping[str, Sharding]):
        self._specs = shapes
        self._shapes = {name: tuple(x.shape) for name, x in shapes.items()}
        self._shardings = shardings
        needed: set[int] = set()
        for name, shape in self._shapes.items():
            for index in shardings[name].addressable_devices_indices_map(shape).values():
                needed.update(range(*index[0].indices(shape[0])))
        self.rows = sorted(needed)

    def to_devices(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Global arrays from the rows of this process, ``[len(self.rows), ...]`` for each entry."""
        check_batch(batch, self._specs, len(self.rows))
        return {name: self._place(name, rows) for name, rows in batch.items()}

    def _place(self, name: str, rows: np.ndarray) -> jax.Array:
        shape = self._shapes[name]

        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(shape[0])
            first = self.rows.index(start)
            return rows[(slice(first, first + stop - start), *index[1:])]

        return jax.make_array_from_callback(shape, self._shardings[name], part)


class DeviceBatches:
    """Transfers the next batch to the devices while a step runs."""

    def __init__(self, source: Any, placement: BatchPlacement, ahead: int = 1):
        self._source, self._placement, self._ahead = source, placement, ahead
        self._queue = collections.deque()  # (batch on the devices, state of the source after it)
        self._state = source.get_state()

    def __iter__(self) -> Iterator[dict]:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        while len(self._queue) <= self._ahead:
            rows = next(self._source)
            self._queue.append((self._placement.to_devices(rows), self._source.get_state()))
        batch, self._state = self._queue.popleft()
        return batch

    def get_state(self) -> dict:
        """State of the source after the last batch that was returned, for all rows.

        Waits for all processes: each knows only the state of its own rows.
        """
        return merged_states(gather_records(self._state))


def merged_states(states: list[dict]) -> dict:
    """Merges the states that all processes have of a source.

    An entry that is a dictionary describes single rows, and is merged; any other entry must be the
    same in all processes.

    Raises:
      ConfigError: it is not.
    """
    merged = dict(states[0])
    for state in states[1:]:
        for name, value in state.items():
            if isinstance(value, dict):
                merged[name] = merged[name] | value
            elif merged[name] != value:
                raise ConfigError(
                    f"the processes read different data: {name} is {merged[name]} and {value}"
                )
    return merged
