"""Which processes are alive: each keeps a connection to process 0 open for as long as it runs.

XLA's coordination service does not name the processes that fail to connect, and it ends the others
with an abort and a page of log. So every process first reports here by its index. During the run, a
connection that closes without a message shows at once which process is gone, and an error in one
process (a full disk) ends all of them with its text. No training data goes over these connections,
and the heartbeats of XLA's service still detect what closes no connection: a machine that hangs.

Strangers may connect as well, and say anything. Before XLA's service connects the processes they
have no secret in common, so until then a connection shows only that somebody is there. Afterwards
they share one, and only who proves to know it can end the others (`attendance.py`, `peer.py`).
However it ends them, they exit with an error.
"""

import os
import sys
import threading
import time

from genai_jax.errors import printable
from genai_jax.training.address import listen
from genai_jax.training.attendance import Attendance
from genai_jax.training.peer import foreign_text
from genai_jax.training.presence import Presence

_GRACE_S = 2.0  # for a main thread that is already failing for the reason another process reports
_LAST_S = 3.0  # process 0 waits this long for the others to exit first


class RollCall:
    """The connections of one process.

    Args:
      host: of process 0, reachable from all processes.
      port: on which process 0 listens, on the address of `host` alone.
      count: number of processes.
      index: of this process.
      timeout_s: how long to wait for all of them.

    Raises:
      ConfigError: some processes did not connect in time; they are named.
    """

    def __init__(self, host: str, port: int, count: int, index: int, timeout_s: float):
        self.index = index
        self._leaving = False
        self._last_word, self._one_end = threading.Lock(), threading.Lock()
        self._ended = threading.Event()
        self.reason, self.code = "", 1  # why all processes have to exit, and the exit code
        if index == 0:
            server = listen(host, port, time.monotonic() + timeout_s)
            self._others = Attendance(server, count, timeout_s, self._end)
        else:
            self._others = Presence(host, port, count, index, timeout_s, self._end)
        self._others.gather()

    def confirm(self):
        """To be called when XLA's service has connected all processes.

        From then on a process that leaves is missed, even before it has proven who it is.
        """
        self._others.confirm()

    def prove(self, secret: bytes):
        """Waits until all have proven that they know the secret, which only processes can know.

        Raises:
          ConfigError: some did not in time.
        """
        self._others.prove(secret)

    def tell(self, reason: str, code: int):
        """Ends all other processes, which show `reason`; this one is about to exit by itself."""
        self._leaving = True
        if not self._ended.is_set():
            reason = f"process 0: {reason}" if self.index == 0 else reason
            self._others.send({"end": foreign_text(reason), "code": code})

    def bye(self):
        """Announces that this process ended normally."""
        self._leaving = True
        self._others.send({"bye": True})

    def wait_for_end(self, seconds: float) -> bool:
        """Waits up to `seconds` for another process to end or fail; returns whether one did."""
        return self._ended.wait(seconds)

    def leave(self, reason: str, code: int):
        """Ends this process with a one-line error, whatever its other threads are waiting for."""
        self._last_word.acquire()  # never released: only one thread prints
        advice = "; run the same command to resume from the last checkpoint" if code == 1 else ""
        print(f"error: {printable(reason)}{advice}", file=sys.stderr)
        self.exit(code)

    def exit(self, code: int):
        """Ends this process, whatever its other threads are waiting for.

        Process 0 first waits for the others: it runs XLA's service, whose end aborts them.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        self._others.wait_until_left(_LAST_S)
        os._exit(code)

    def _end(self, reason: str, code: int):
        """Called when another process ended or failed; only the first call counts."""
        with self._one_end:
            if self._ended.is_set() or self._leaving:
                return
            self.reason, self.code = reason, code
            self._ended.set()
        threading.Thread(target=self._follow, daemon=True, name="end").start()

    def _follow(self):
        if self.index == 0:
            self._others.send({"end": foreign_text(self.reason), "code": self.code})
        if self.code != 1:
            time.sleep(_GRACE_S)
        if not self._leaving:  # the main thread may be waiting for the lost process forever
            self.leave(self.reason, self.code)
