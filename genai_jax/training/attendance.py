"""Process 0 keeps the attendance: which processes are there, and which connection is whose.

Anybody can connect and claim to be process 1, so a claim only counts as presence. Several claims to
one index are kept side by side, the oldest of too many is dropped, and a process that is dropped
comes back; so a stranger neither displaces a process nor ends the run. Once the processes share a
secret, the claim that knows it is the process, and process 0 stops listening.
"""

import functools
import selectors
import socket
import threading
import time
from collections.abc import Callable

from genai_jax.config import ConfigError
from genai_jax.training.peer import Peer, failure_code, foreign_text, is_nonce

HELLO_S = 5.0  # for a connection to say which process it is
_STRANGERS = 64  # connections that have not said so yet
_CLAIMS = 8  # connections that claim to be the same process


class Attendance:
    """Process 0's side of the roll call.

    Args:
      server: a listening socket.
      count: number of processes.
      seconds: how long to wait for all of them.
      end: called with the reason and the exit code when one of them is gone or says that it failed.
    """

    def __init__(
        self, server: socket.socket, count: int, seconds: float, end: Callable[[str, int], None]
    ):
        self._server, self._count, self._seconds, self._end = server, count, seconds, end
        self._deadline = time.monotonic() + seconds
        self._secret = b""
        self._connected = False  # every process has been here by now
        self._closing = False
        self._strangers: dict[Peer, float] = {}  # and since when; the oldest first
        self._claims: dict[int, list[Peer]] = {i: [] for i in range(1, count)}
        self._proven: dict[int, Peer] = {}
        self._absent = set(self._claims)  # indices with neither
        self._open: set[Peer] = set()  # all of these
        self._crowded: set[int] = set()  # indices whose claims were too many
        self._said_bye: set[int] = set()
        self._last_words: dict[int, tuple[str, int] | None] = {}
        self._refused = ""
        self._all_there, self._all_proven = threading.Event(), threading.Event()
        self._waker, self._woken = socket.socketpair()
        threading.Thread(target=self._run, daemon=True, name="roll call").start()

    def gather(self):
        """Waits until all processes are there.

        Raises:
          ConfigError: some did not come in time; they are named, to those that came as well.
        """
        if self._all_there.wait(max(self._deadline - time.monotonic(), 0.01)):
            return
        reason = self._absence()
        self.send({"end": reason, "code": 2})
        self.close()
        raise ConfigError(reason)

    def confirm(self):
        """Announces that XLA's service has connected all processes: all of them have been here."""
        self._connected = True
        self._wake()

    def prove(self, secret: bytes):
        """Waits until all processes have proven that they know the secret.

        Raises:
          ConfigError: some did not in time.
        """
        self._secret = secret
        self.confirm()
        if not self._all_proven.wait(self._seconds):
            names = process_names(self._claims.keys() - self._proven.keys())
            raise ConfigError(
                f"{names} of {self._count} did not prove within {self._seconds:g} s to be part of "
                "this run"
            )

    def send(self, message: dict):
        """Sends a message to all processes."""
        for peer in list(self._open):
            if peer not in self._strangers:
                peer.send(message)

    def wait_until_left(self, seconds: float):
        """Waits up to `seconds` for all others to close their connections."""
        deadline = time.monotonic() + seconds
        while self._open and time.monotonic() < deadline:
            time.sleep(0.01)

    def close(self):
        """Closes all connections."""
        self._closing = True
        self._wake()

    def _wake(self):
        """Wakes the thread below, to which all connections belong."""
        self._waker.send(b"!")

    def _run(self):
        with selectors.DefaultSelector() as self._selector:
            self._selector.register(self._server, selectors.EVENT_READ, self._accept)
            self._selector.register(self._woken, selectors.EVENT_READ, self._on_wake)
            while not self._closing:
                wait = None if self._all_proven.is_set() else HELLO_S / 10
                for key, _ in self._selector.select(wait):
                    key.data()
                self._look()
            for peer in list(self._open):
                self._drop(peer)
        self._server.close()

    def _on_wake(self):
        self._woken.recv(64)
        if self._secret:
            for peer in [peer for claims in self._claims.values() for peer in claims]:
                if not peer.sealed:
                    peer.share(self._secret)
                    self._hear(peer)  # its proof may have arrived before

    def _accept(self):
        try:
            peer = Peer(self._server.accept()[0], serves=True)
        except OSError:  # it left already, or the system has no room for more
            time.sleep(0.01)
            return
        self._open.add(peer)
        self._strangers[peer] = time.monotonic()
        self._selector.register(peer, selectors.EVENT_READ, functools.partial(self._hear, peer))
        if len(self._strangers) > _STRANGERS:
            self._drop(next(iter(self._strangers)))

    def _hear(self, peer: Peer):
        if peer not in self._open:
            return
        for message in peer.receive():
            if peer.proven:
                self._obey(peer, message)
            elif peer.index is None:
                self._admit(peer, message)
            elif "end" in message and peer.last_words is None:
                peer.last_words = foreign_text(message["end"]), failure_code(message.get("code"))
            else:
                peer.lost = True
        if peer.lost:
            self._drop(peer)

    def _admit(self, peer: Peer, message: dict):
        """Keeps a connection that says which process it is."""
        index, count, nonce = (message.get(name) for name in ("index", "count", "nonce"))
        if not (type(index) is type(count) is int and is_nonce(nonce) and 0 < index < count < 1e9):
            peer.lost = True
        elif count != self._count or index in self._proven:
            self._refused = reason = (
                f"process {index} of {count} tried to join a run of {self._count} processes"
                + (" that already has one with that index" if index in self._proven else "")
            )
            peer.send({"end": reason, "code": 2})
            peer.lost = True
        else:
            peer.index, peer.nonce_of_other = index, nonce
            del self._strangers[peer]
            self._claims[index].append(peer)
            self._absent.discard(index)
            if len(self._claims[index]) > _CLAIMS:
                self._crowded.add(index)
                self._drop(self._claims[index][0])
            if self._all_there.is_set():
                self._welcome(peer)

    def _welcome(self, peer: Peer):
        peer.send({"all": self._count, "nonce": peer.nonce})
        if self._secret:
            peer.share(self._secret)

    def _obey(self, peer: Peer, message: dict):
        """Does what a process says that has proven to be one."""
        index = peer.index
        if index not in self._proven:
            self._proven[index] = peer
            self._claims[index].remove(peer)
            for other in list(self._claims[index]):
                self._drop(other)
            peer.send({"here": True})
            if len(self._proven) == self._count - 1:
                self._stop_listening()
        if "bye" in message:
            self._said_bye.add(index)
        elif "end" in message:
            self._end(
                f"process {index}: {foreign_text(message['end'])}",
                failure_code(message.get("code")),
            )

    def _stop_listening(self):
        self._selector.unregister(self._server)
        self._server.close()
        for peer in list(self._strangers):
            self._drop(peer)
        self._all_proven.set()

    def _drop(self, peer: Peer):
        if peer not in self._open:
            return
        self._open.remove(peer)
        self._selector.unregister(peer)
        peer.close()
        self._strangers.pop(peer, None)
        if peer in self._claims.get(peer.index, ()):
            self._claims[peer.index].remove(peer)
            self._last_words[peer.index] = peer.last_words
            if not self._claims[peer.index] and peer.index not in self._proven:
                self._absent.add(peer.index)
        elif self._proven.get(peer.index) is peer and peer.index not in self._said_bye:
            self._end(f"process {peer.index} is gone", 1)

    def _look(self):
        """What follows from time and from who is there."""
        now = time.monotonic()
        while self._strangers and now - next(iter(self._strangers.values())) > HELLO_S:
            self._drop(next(iter(self._strangers)))
        if not self._absent and not self._all_there.is_set():
            for claims in self._claims.values():
                for peer in claims:
                    self._welcome(peer)
            self._all_there.set()
        elif self._connected:
            # Each of these had a claim, and none of its claims was dropped here: it closed them.
            for index in self._absent - self._crowded:
                said, code = self._last_words.get(index) or ("", 1)
                self._end(f"process {index}" + (f": {said}" if said else " is gone"), code)
        elif self._absent and self._all_there.is_set() and now > self._deadline:
            self._end(self._absence(), 2)  # only strangers were there in its place

    def _absence(self) -> str:
        """The line that names those who did not come, and what may be the cause."""
        several = [i for i, claims in self._claims.items() if len(claims) > 1]
        return (
            f"{process_names(self._absent)} of {self._count} did not join within "
            f"{self._seconds:g} s"
            + (f"; several claim to be {process_names(set(several))}" if several else "")
            + (f"; {self._refused}" if self._refused else "")
        )


def process_names(indices: set[int]) -> str:
    """ "process 1", "processes 1, 2"; a long list is cut."""
    shown = ", ".join(str(index) for index in sorted(indices)[:16])
    more = f" and {len(indices) - 16} more" if len(indices) > 16 else ""
    return f"process{'es' if len(indices) > 1 else ''} {shown}{more}"
