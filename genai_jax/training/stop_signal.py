"""SIGTERM and SIGINT ask a run to save and leave; a second one ends it at once.

With several processes a signal may reach any one of them, and all have to stop at the same step. So
each time that they ask, the signals of all processes are reduced to their maximum on the devices,
and the answer is read when they ask the next time: one tiny program in the queue behind each step,
and nobody waits for it. (`multihost_utils.reached_preemption_sync_point` serves SIGTERM alone, and
steps alone: not SIGINT, nor the batches of an evaluation.)
"""

import signal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


class Stopped(Exception):
    """Raised where work is abandoned because a signal arrived."""


class StopSignal:
    """While entered, remembers the first SIGTERM or SIGINT; `agreed` is what all know of it."""

    def __init__(self):
        self._received = 0
        self._before = {}
        self._agreement = _Agreement() if jax.process_count() > 1 else None
        self.agreed: int | None = None  # the same in all processes, as of their last question

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number, _frame):
        self._received = number
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)

    def ask(self) -> int | None:
        """The signal on which all processes are to stop, once they know: one question later.

        All processes must ask as often as each other.
        """
        found = self._agreement.exchange(self._received) if self._agreement else self._received
        self.agreed = self.agreed or found or None
        return self.agreed

    def watch(self, items):
        """Passes `items` on, and raises `Stopped` once a signal has arrived."""
        for item in items:
            if self.ask():
                raise Stopped
            yield item


class _Agreement:
    """The maximum of a number over all processes, one question late."""

    def __init__(self):
        mesh = Mesh(np.array(jax.devices()), ("all",), axis_types=(AxisType.Auto,))
        self._split = NamedSharding(mesh, PartitionSpec("all"))
        self._maximum = jax.jit(
            lambda x: x.max(), out_shardings=NamedSharding(mesh, PartitionSpec())
        )
        self._questions: dict[int, jax.Array] = {}  # number -> it on every device of this process
        self._answer: jax.Array | None = None  # to the last question

    def exchange(self, number: int) -> int:
        """Puts `number` into the queue of the devices; returns the answer to the last question."""
        before = self._answer
        if number not in self._questions:
            self._questions[number] = jax.make_array_from_callback(
                (jax.device_count(),), self._split, lambda _: np.array([number], np.int32)
            )
        self._answer = self._maximum(self._questions[number])
        return 0 if before is None else int(before)
