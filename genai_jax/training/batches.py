"""From a process's own rows in host memory to global arrays on the devices."""

import collections
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from genai_jax.config import ConfigError
from genai_jax.training.distributed import gathered


class BatchPlacement:
    """Which rows of the global batch this process has to make, and the way to its devices.

    Devices that split the length, or nothing of the batch, need the same rows as others do: several
    processes may then make a row, each for its own devices.

    Args:
      shapes: batch entry -> shape of the global array, its rows first.
      shardings: batch entry -> its sharding.

    Attributes:
      rows: those that this process's devices need of any entry, in order.
    """

    def __init__(self, shapes: Mapping[str, Any], shardings: Mapping[str, Sharding]):
        self._shapes = {name: tuple(x.shape) for name, x in shapes.items()}
        self._shardings = shardings
        needed: set[int] = set()
        for name, shape in self._shapes.items():
            for index in shardings[name].addressable_devices_indices_map(shape).values():
                needed.update(range(*index[0].indices(shape[0])))
        self.rows = sorted(needed)

    def to_devices(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Global arrays out of this process's rows: each entry ``[len(self.rows), ...]``."""
        return {name: self._place(name, rows) for name, rows in batch.items()}

    def _place(self, name: str, rows: np.ndarray) -> jax.Array:
        shape = self._shapes[name]

        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(shape[0])
            first = self.rows.index(start)
            return rows[(slice(first, first + stop - start), *index[1:])]

        return jax.make_array_from_callback(shape, self._shardings[name], part)


class DeviceBatches:
    """Keeps the next batch on its way to the devices while a step runs."""

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
        """State of the source after the last batch that was handed out, for all rows.

        Waits for all processes: each knows where its own rows are.
        """
        return joined_states(gathered(self._state))


def joined_states(states: list[dict]) -> dict:
    """One state of a source out of those of all processes.

    An entry that is a dictionary says something of single rows, and is joined; any other must be
    the same everywhere.

    Raises:
      ConfigError: it is not.
    """
    whole = dict(states[0])
    for state in states[1:]:
        for name, value in state.items():
            if isinstance(value, dict):
                whole[name] = whole[name] | value
            elif whole[name] != value:
                raise ConfigError(
                    f"the processes read different data: {name} is {whole[name]} and {value}"
                )
    return whole
