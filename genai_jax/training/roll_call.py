"""Which processes are alive: each keeps a connection to process 0 open for as long as it runs.

XLA's coordination service does not name the processes that fail to connect, and it ends the others
with an abort and a page of log. So every process first reports here by its index. During the run, a
connection that closes without a message shows at once which process is gone, and an error in one
process (a full disk) ends all of them with its text. No training data goes over these connections,
and the heartbeats of XLA's service still detect what closes no connection: a machine that hangs.
"""

import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time

from genai_jax.config import ConfigError

_GRACE_S = 2.0  # for a main thread that is already failing for the reason another process reports
_LAST_S = 3.0  # process 0 waits this long for the others to exit first


class RollCall:
    """The connections of one process.

    Args:
      host: of process 0, reachable from all processes.
      port: on which process 0 listens.
      count: number of processes.
      index: of this process.
      timeout_s: how long to wait for all of them.

    Raises:
      ConfigError: some processes did not connect in time; they are named.
    """

    def __init__(self, host: str, port: int, count: int, index: int, timeout_s: float):
        self.index, self._count = index, count
        self._lines: dict[int, socket.socket] = {}  # index of the other process -> connection
        self._leaving = False
        self._last_word = threading.Lock()
        self._ended = threading.Event()
        self.reason, self.code = "", 1  # why all processes have to exit, and the exit code
        deadline = time.monotonic() + timeout_s
        if index == 0:
            self._gather(port, timeout_s, deadline)
        else:
            self._report(host, port, timeout_s, deadline)
        for line in self._lines.values():
            line.settimeout(None)
        threading.Thread(target=self._watch, daemon=True, name="roll call").start()

    def tell(self, reason: str, code: int):
        """Ends all other processes, which show `reason`; this one is about to exit by itself."""
        self._leaving = True
        if not self._ended.is_set():
            self._send_all({"end": f"process {self.index}: {reason}", "code": code})

    def bye(self):
        """Announces that this process ended normally."""
        self._leaving = True
        self._send_all({"bye": True})

    def wait_for_end(self, seconds: float) -> bool:
        """Waits up to `seconds` for another process to end or fail; returns whether one did."""
        return self._ended.wait(seconds)

    def leave(self, reason: str, code: int):
        """Ends this process with a one-line error, whatever its other threads are waiting for."""
        self._last_word.acquire()  # never released: only one thread prints
        advice = "; run the same command to resume from the last checkpoint" if code == 1 else ""
        print(f"error: {' '.join(reason.split())}{advice}", file=sys.stderr)
        self.exit(code)

    def exit(self, code: int):
        """Ends this process, whatever its other threads are waiting for.

        Process 0 first waits for the others: it runs XLA's service, whose end aborts them.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        if self.index == 0:
            deadline = time.monotonic() + _LAST_S
            for line in self._lines.values():
                _wait_for_silence(line, deadline)
        os._exit(code)

    def _gather(self, port: int, timeout_s: float, deadline: float):
        """In process 0: waits for the others."""
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        try:
            listening = socket.create_server(("", port), family=family, dualstack_ipv6=dual)
        except OSError as error:
            raise ConfigError(
                f"process 0 cannot listen on port {port}, one above --distributed.coordinator: "
                f"{error.strerror}"
            ) from None
        with listening as server:
            while missing := set(range(1, self._count)) - self._lines.keys():
                server.settimeout(max(deadline - time.monotonic(), 0.01))
                try:
                    self._admit(server.accept()[0])
                except TimeoutError:
                    self._refuse(
                        f"{_process_names(missing)} of {self._count} did not join within "
                        f"{timeout_s:g} s"
                    )
        self._send_all({"all": self._count})

    def _admit(self, line: socket.socket):
        """Admits the process at the other end of a new connection; others are ignored."""
        line.settimeout(5)
        message = _receive(line)
        if not isinstance(message, dict) or not {"index", "count"} <= message.keys():
            line.close()
            return
        index, count = message["index"], message["count"]
        if index in self._lines or count != self._count:
            self._lines[-1] = line
            self._refuse(
                f"process {index} of {count} tried to join a run of {self._count} processes"
                + (" that already has one with that index" if index in self._lines else "")
            )
        _keep_alive(line)
        self._lines[index] = line

    def _refuse(self, reason: str):
        self._send_all({"end": reason, "code": 2})
        raise ConfigError(reason)

    def _report(self, host: str, port: int, timeout_s: float, deadline: float):
        """In any other process: reports to process 0 and waits until all are there."""
        problem = f"process 0 did not join within {timeout_s:g} s: nothing answers at {host}:{port}"
        while True:
            try:
                line = socket.create_connection((host, port), timeout=5)
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise ConfigError(f"{problem} ({error.strerror or error})") from None
                time.sleep(0.1)
        _keep_alive(line)
        self._lines[0] = line
        self._send_all({"index": self.index, "count": self._count})
        line.settimeout(timeout_s + 10)  # process 0 may have begun to wait just now
        message = _receive(line)
        if not message:
            raise ConfigError("process 0 ended before all processes could join")
        if "end" in message:
            raise ConfigError(message["end"])

    def _watch(self):
        """In a thread: waits for messages of the others, or for their connections to close."""
        with selectors.DefaultSelector() as selector:
            for index, line in self._lines.items():
                selector.register(line, selectors.EVENT_READ, index)
            while selector.get_map():
                for key, _ in selector.select():
                    message = _receive(key.fileobj)
                    selector.unregister(key.fileobj)
                    if not message:
                        self._end(f"process {key.data} is gone", 1)
                    elif "end" in message:
                        self._end(message["end"], message["code"])

    def _end(self, reason: str, code: int):
        if self._ended.is_set() or self._leaving:
            return
        self.reason, self.code = reason, code
        self._ended.set()
        if self.index == 0:
            self._send_all({"end": reason, "code": code})
        if code != 1:
            time.sleep(_GRACE_S)
        if not self._leaving:  # the main thread may be waiting for the lost process forever
            self.leave(reason, code)

    def _send_all(self, message: dict):
        for line in self._lines.values():
            try:
                line.sendall(json.dumps(message).encode() + b"\n")
            except OSError:  # it is gone; the watching thread notices
                continue


def _wait_for_silence(line: socket.socket, deadline: float):
    """Returns when the other end closes the connection, or at the deadline."""
    with contextlib.suppress(OSError):
        line.settimeout(max(deadline - time.monotonic(), 0.01))
        while line.recv(4096):
            continue


def _receive(line: socket.socket) -> dict | None:
    """The next message; None if the connection closed or what came is not a message."""
    try:
        with line.makefile("rb", buffering=0) as file:
            return json.loads(file.readline())
    except (OSError, ValueError):
        return None


def _keep_alive(line: socket.socket):
    """Makes the system notice within half a minute that the other machine is gone."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _process_names(indices: set[int]) -> str:
    """ "process 1", "processes 1, 2"; a long list is cut."""
    shown = ", ".join(str(index) for index in sorted(indices)[:16])
    more = f" and {len(indices) - 16} more" if len(indices) > 16 else ""
    return f"process{'es' if len(indices) > 1 else ''} {shown}{more}"
