"""SIGTERM, SIGINT, and SIGHUP make a run save a checkpoint and exit.

Signals often come in groups: a closing terminal sends SIGHUP twice, `timeout` sends SIGTERM to the
process and to its group, an impatient user presses Ctrl-C and then uses `kill`. So the first one
counts. Only the same signal again, half a second later or more, ends the process at once; SIGHUP,
which nobody sends by hand, never does.

With several processes, a signal may reach any one of them, but all have to stop at the same step.
So whenever they ask, the signals of all processes are reduced to their maximum on the devices, and
the answer is read when they ask the next time: one tiny program queued after each step, which no
host waits for. (`multihost_utils.reached_preemption_sync_point` covers only SIGTERM and only steps,
not SIGINT or the batches of an evaluation.)
"""

import contextlib
import os
import signal
import sys
import threading
import time

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

TOGETHER_S = 0.5  # the same signal within this time after the first counts as one
FAILED = 128  # in place of a signal: one process has a problem that need not lose the state


class Stopped(Exception):
    """Raised to abandon work because a signal arrived."""


class StopSignal:
    """While entered, records the first signal; `agreed` is what all processes know.

    Args:
      listens: whether to install signal handlers, which only the main thread can; without them,
        `receive` has to be called. None: in the main thread.

    Attributes:
      received: the first signal of this process; 0 if there is none.
      agreed: the same in all processes, as of the last `ask`.
    """

    def __init__(self, listens: bool | None = None):
        main = threading.current_thread() is threading.main_thread()
        self._listens = main if listens is None else listens
        self.received = 0
        self._before = {}
        self._agreement: _Agreement | None = None
        self.agreed: int | None = None

    def __enter__(self):
        self._agreement = _Agreement() if jax.process_count() > 1 else None
        if not self._listens:
            return self
        # Python runs a handler when the main thread returns to it, which may be compiling for
        # minutes or waiting for a device forever. The thread hears of every signal at once.
        self._receiving, self._sending = os.pipe()
        os.set_blocking(self._sending, False)
        self._wakeup = signal.set_wakeup_fd(self._sending, warn_on_full_buffer=False)
        threading.Thread(target=self._end_when_repeated, daemon=True, name="signals").start()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                self._before[number] = signal.signal(number, self.receive)
        return self

    def __exit__(self, *_):
        if not self._listens:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._sending)  # the thread ends

    def receive(self, number: int, _frame=None):
        """Records a signal; the first one counts."""
        self.received = self.received or number

    def _end_when_repeated(self):
        """In a thread: ends the process when a signal comes for the second time."""
        first: dict[int, float] = {}
        while numbers := os.read(self._receiving, 64):
            for number in numbers:
                since = time.monotonic() - first.setdefault(number, time.monotonic())
                if number in (signal.SIGTERM, signal.SIGINT) and since > TOGETHER_S:
                    with contextlib.suppress(OSError, ValueError):
                        os.write(sys.stderr.fileno(), b"ended at once by a second signal\n")
                    os._exit(128 + number)
        os.close(self._receiving)

    def fail(self):
        """Makes all processes save and stop, for a problem of this one."""
        self.received = self.received or FAILED

    def ask(self) -> int | None:
        """The signal on which all processes stop, once all know of it: one call later.

        All processes must call this equally often.
        """
        signals = self._agreement.exchange(self.received) if self._agreement else self.received
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
