"""One connection of the roll call: short messages, authenticated once a secret is shared.

A message is a line: a JSON object and, when sealed, the MAC of that object in front of it. The key
of the MAC is derived from the secret and from a fresh nonce of either end, and every sealed message
is counted, so nothing that was recorded or changed on the way passes. Whatever the other end sends,
`Peer` holds a bounded number of bytes, never blocks, and raises nothing.
"""

import contextlib
import hmac
import json
import secrets
import socket
import threading
from collections.abc import Iterator

from genai_jax.errors import printable

MESSAGE_BYTES = 2048
TEXT_BYTES = 500  # of a text within a message


class Peer:
    """A connection to another process, or to a stranger who may say anything.

    Args:
      connection: an open socket, which this object owns from now on.
      serves: whether this end is process 0.
    """

    def __init__(self, connection: socket.socket, serves: bool):
        connection.setblocking(False)
        _keep_alive(connection)
        self._connection, self._serves = connection, serves
        self._arrived = b""
        self.lost = False  # the other end closed it, or sent what no process of a run sends
        self._keys: dict[bool, bytes] = {}  # whether process 0 sends with it -> key
        self._counts = {True: 0, False: 0}  # of sealed messages, by the same
        self._sending = threading.Lock()
        self.index: int | None = None  # of the end that is not process 0, as it says
        self.nonce, self.nonce_of_other = secrets.token_hex(16), ""
        self.proven = False  # whether the other end knows the secret
        self.last_words: tuple[str, int] | None = None  # of an end that is not proven

    def fileno(self) -> int:
        """For selectors."""
        return self._connection.fileno()

    def close(self):
        self._connection.close()

    @property
    def sealed(self) -> bool:
        """Whether what this end sends is sealed."""
        return bool(self._keys)

    def share(self, secret: bytes):
        """Seals what is sent from now on; both ends know the index and both nonces."""
        nonces = [self.nonce, self.nonce_of_other]
        nonces = nonces if self._serves else nonces[::-1]
        self._keys = {
            serves: hmac.digest(
                secret, json.dumps([self.index, serves, *nonces]).encode(), "sha256"
            )
            for serves in (True, False)
        }

    def send(self, message: dict):
        """Sends a message; if the other end does not take it at once, the connection ends."""
        with self._sending:
            text = json.dumps(message, ensure_ascii=False).encode()
            if self._keys:
                text = self._seal(self._serves, text) + b" " + text
            try:
                whole = self._connection.send(text + b"\n") == len(text) + 1
            except OSError:
                whole = False
            if not whole:
                with contextlib.suppress(OSError):
                    self._connection.shutdown(socket.SHUT_RDWR)  # whoever reads it notices

    def receive(self) -> Iterator[dict]:
        """The messages that arrived; sealed ones wait until the secret is shared."""
        try:
            arrived = self._connection.recv(MESSAGE_BYTES)
            self.lost |= not arrived
            self._arrived += arrived
        except BlockingIOError:
            pass
        except OSError:
            self.lost = True
        try:
            while (message := self._next()) is not None:
                yield message
        except ValueError:
            self.lost = True
        self.lost |= len(self._arrived) > MESSAGE_BYTES

    def _next(self) -> dict | None:
        """The next message, if it is complete and can be checked.

        Raises:
          ValueError: it is not a message of this run.
        """
        text, end, rest = self._arrived.partition(b"\n")
        sealed = not text.startswith(b"{")
        if not end or (sealed and not self._keys):
            return None
        self._arrived = rest
        if sealed:
            seal, _, text = text.partition(b" ")
            if not hmac.compare_digest(seal, self._seal(not self._serves, text)):
                raise ValueError("not sealed with the secret of this run")
            self.proven = True
        elif self.proven:
            raise ValueError("not sealed")
        try:
            return dict(json.loads(text))
        except (TypeError, RecursionError):
            raise ValueError("not an object") from None

    def _seal(self, serves: bool, text: bytes) -> bytes:
        count = self._counts[serves]
        self._counts[serves] += 1
        return hmac.digest(self._keys[serves], b"%d %b" % (count, text), "sha256").hex().encode()


def foreign_text(value: object) -> str:
    """A text from another process, or for one: printable and short; empty if it is no text."""
    if not isinstance(value, str):
        return ""
    text = printable(value[:MESSAGE_BYTES]).encode()
    return text[:TEXT_BYTES].decode(errors="ignore") + ("..." if len(text) > TEXT_BYTES else "")


def is_nonce(value: object) -> bool:
    """Whether `value` can be what the other end sent as its nonce."""
    return isinstance(value, str) and 0 < len(value) <= 64


def failure_code(value: object) -> int:
    """The exit code that another process asks for; never that of success."""
    return value if type(value) is int and 0 < value < 256 else 1


def _keep_alive(connection: socket.socket):
    """Makes the system notice within half a minute that the other machine is gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
