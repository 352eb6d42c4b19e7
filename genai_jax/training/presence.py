"""Every process but 0 reports its presence to process 0 and keeps the connection open."""

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Callable

from genai_jax.config import ConfigError
from genai_jax.training.address import addresses
from genai_jax.training.peer import Peer, failure_code, foreign_text, is_nonce

_RETRY_S = 0.1
_CONNECT_S = 5.0
_LATER_S = 10.0  # process 0 may have begun to wait this much later


class Presence:
    """The side of the roll call of any process but 0.

    What answers at the address of process 0 is believed before there is a secret, as XLA does with
    its own service: all that it can do is end this process, with an error.

    Args:
      host: of process 0.
      port: on which process 0 listens.
      count: number of processes.
      index: of this one.
      seconds: how long to wait for the others.
      end: called with the reason and the exit code when process 0 is gone or says that one failed.
    """

    def __init__(
        self, host: str, port: int, count: int, index: int, seconds: float,
        end: Callable[[str, int], None],
    ):  # fmt: skip
        self._host, self._port, self._seconds, self._end = host, port, seconds, end
        self._count, self._index = count, index
        self._deadline = time.monotonic() + seconds
        self._secret = b""
        self._failure = ""  # why this process cannot join
        self._peer: Peer | None = None
        self._over = False
        self._joined, self._settled = threading.Event(), threading.Event()
        self._proven = threading.Event()
        self._waker, self._woken = socket.socketpair()
        threading.Thread(target=self._run, daemon=True, name="roll call").start()

    def gather(self):
        """Waits until all processes are there.

        Raises:
          ConfigError: some did not come in time; process 0 names them.
        """
        self._settled.wait()
        if self._failure:
            raise ConfigError(self._failure)

    def confirm(self):
        """Process 0 alone concludes anything from this."""

    def prove(self, secret: bytes):
        """Proves to know the secret, and waits until process 0 has proven it as well.

        Raises:
          ConfigError: it did not in time.
        """
        self._secret = secret
        self._waker.send(b"!")
        if not self._proven.wait(self._seconds):
            raise ConfigError(
                f"process 0 did not prove within {self._seconds:g} s to be part of this run"
            )

    def send(self, message: dict):
        """Sends a message to process 0, which passes it on."""
        self._peer.send(message)

    def wait_until_left(self, seconds: float):
        """Process 0 alone waits for the others."""

    def _run(self):
        while not self._over and (connection := self._connect()):
            with contextlib.closing(Peer(connection, serves=False)) as peer:
                self._attend(peer)
            if not self._over and peer.proven:
                self._over = True
                self._end("process 0 is gone", 1)
            time.sleep(_RETRY_S)  # before this is known, process 0 may have dropped it for others

    def _connect(self) -> socket.socket | None:
        """A connection to process 0, as soon as it listens; None when that is hopeless."""
        while True:
            problem = None
            try:
                for _, ip in addresses(self._host, self._port):
                    try:
                        return socket.create_connection((ip, self._port), timeout=_CONNECT_S)
                    except OSError as error:
                        refused = isinstance(problem, ConnectionRefusedError)
                        problem = problem if refused else error
            except OSError as error:  # the name is unknown
                problem = error
            if self._peer and isinstance(problem, ConnectionRefusedError):
                return self._fail("process 0 ended before all processes could join")
            if time.monotonic() > self._deadline:
                return self._fail(
                    f"process 0 did not join within {self._seconds:g} s: nothing answers at "
                    f"{self._host}:{self._port} ({problem.strerror or problem})"
                )
            time.sleep(_RETRY_S)

    def _fail(self, reason: str):
        """Gives up on process 0."""
        self._over = True
        if self._joined.is_set():
            self._end("process 0 is gone", 1)
        self._failure = reason
        self._settled.set()

    def _attend(self, peer: Peer):
        """Reports to process 0, then listens to it until the connection ends."""
        peer.index, self._peer = self._index, peer
        peer.send({"index": self._index, "count": self._count, "nonce": peer.nonce})
        with selectors.DefaultSelector() as selector:
            selector.register(peer, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while not peer.lost and not self._over:
                left = self._deadline + _LATER_S - time.monotonic()
                if not self._joined.is_set() and left < 0:
                    self._fail(
                        f"process 0 did not join within {self._seconds:g} s: what answers at "
                        f"{self._host}:{self._port} does not behave like it"
                    )
                    return
                events = selector.select(None if self._joined.is_set() else left)
                if any(key.fileobj is self._woken for key, _ in events):
                    self._woken.recv(64)
                for message in peer.receive():
                    self._obey(peer, message)
                if self._secret and peer.nonce_of_other and not peer.sealed:
                    peer.share(self._secret)
                    peer.send({"here": True})

    def _obey(self, peer: Peer, message: dict):
        if "all" in message and is_nonce(message.get("nonce")) and not peer.nonce_of_other:
            peer.nonce_of_other = message["nonce"]
            self._joined.set()
            self._settled.set()
        elif "end" in message:
            reason = foreign_text(message["end"]) or "process 0 ended"
            self._over = True
            if self._joined.is_set():
                self._end(reason, failure_code(message.get("code")))
            else:
                self._fail(reason)
        elif not peer.proven:
            peer.lost = True
        elif "bye" in message:
            self._over = True
        else:
            self._proven.set()
