"""SIGTERM and SIGINT make a run save a checkpoint and exit; a second one ends it at once.

With several processes, a signal may reach any one of them, but all have to stop at the same step.
So whenever they ask, the signals of all processes are reduced to their maximum on the devices, and
the answer is read when they ask the next time: one tiny program queued after each step, which no
host waits for. (`multihost_utils.reached_preemption_sync_point` covers only SIGTERM and only steps,
not SIGINT or the batches of an evaluation.)
"""

import signal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


class Stopped(Exception):
    """Raised to abandon work because a signal arrived."""


class StopSignal:
    """While entered, records the first SIGTERM or SIGINT; `agreed` is what all processes know."""

    def __init__(self):
        self._received = 0
        self._before = {}
        self._agreement = _Agreement() if jax.process_count() > 1 else None
        self.agreed: int | None = None  # the same in all processes, as of the last `ask`

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
        """The signal on which all processes stop, once all know of it: one call later.

        All processes must call this equally often.
        """
        signals = self._agreement.exchange(self._received) if self._agreement else self._received
        self.agreed = self.agreed or signals or None
        return self.agreed

    def watch(self, items):
        """Yields `items`; raises `Stopped` once a signal has arrived."""
        for item in items:
            if self.ask():
                raise Stopped
            yield item


class _Agreement:
    """The maximum of a number over all processes, one call late."""

    def __init__(self):
        mesh = Mesh(np.array(jax.devices()), ("all",), axis_types=(AxisType.Auto,))
        self._split = NamedSharding(mesh, PartitionSpec("all"))
        self._maximum = jax.jit(
            lambda x: x.max(), out_shardings=NamedSharding(mesh, PartitionSpec())
        )
        self._inputs: dict[int, jax.Array] = {}  # number -> array of it on all local devices
        self._answer: jax.Array | None = None  # of the last call

    def exchange(self, number: int) -> int:
        """Enqueues the reduction of `number`; returns the result of the last call."""
        before = self._answer
        if number not in self._inputs:
            self._inputs[number] = jax.make_array_from_callback(
                (jax.device_count(),), self._split, lambda _: np.array([number], np.int32)
            )
        self._answer = self._maximum(self._inputs[number])
        return 0 if before is None else int(before)
