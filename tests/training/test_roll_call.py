"""The roll call among strangers: first, many, slow, huge, lying. And what an end may look like."""

import contextlib
import json
import socket
import threading
import time

import pytest

from benchmarks.roll_call import LINES, Strangers
from genai_jax.config import ConfigError
from genai_jax.errors import printable
from genai_jax.training import address, attendance, presence
from genai_jax.training.attendance import Attendance
from genai_jax.training.peer import TEXT_BYTES, Peer, failure_code, foreign_text
from genai_jax.training.presence import Presence
from genai_jax.training.roll_call import RollCall
from tests.training.test_processes import free_port

SECRET = b"a secret"
HELLO = {"index": 1, "count": 2, "nonce": "n"}


class Host:
    """Process 0 of `count` on some port; `ends` are the ends that it has concluded."""

    def __init__(self, count: int = 2, seconds: float = 20):
        self.port, self.ends, self.count = free_port(), [], count
        server = address.listen("127.0.0.1", self.port, time.monotonic())
        self.attendance = Attendance(server, count, seconds, lambda *end: self.ends.append(end))

    def process(self, index: int = 1) -> Presence:
        return Presence("127.0.0.1", self.port, self.count, index, 20, lambda *end: None)

    def stranger(self, *messages) -> socket.socket:
        line = socket.create_connection(("127.0.0.1", self.port), timeout=5)
        for message in messages:
            data = message if isinstance(message, bytes) else json.dumps(message).encode() + b"\n"
            with contextlib.suppress(OSError):  # closed in the middle
                line.sendall(data)
        return line

    def peer(self, secret: bytes = SECRET) -> Peer:
        """A process played by the test: reported, and about to prove that it knows the secret."""
        peer = Peer(self.stranger(), serves=False)
        peer.index = 1
        peer.send(HELLO | {"nonce": peer.nonce})
        peer.nonce_of_other = wait_for(lambda: list(peer.receive()))[0]["nonce"]
        peer.share(secret)
        return peer

    def close(self):
        self.attendance.close()

    def end(self) -> tuple[str, int]:
        return wait_for(lambda: self.ends)[0]


@pytest.fixture
def host():
    with contextlib.closing(Host()) as host:
        yield host


@pytest.fixture(autouse=True)
def tracebacks(monkeypatch):
    """No thread may fail, whatever comes."""
    seen = []
    monkeypatch.setattr(threading, "excepthook", seen.append)
    yield
    assert seen == []


def wait_for(condition, seconds: float = 5):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return value


def is_closed(line: socket.socket) -> bool:
    """Whether the other end closes the connection, after whatever it says."""
    with contextlib.suppress(ConnectionError):
        while line.recv(4096):
            continue
    return True


def together(*calls):
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def prove(host: Host, process: Presence):
    together(*(lambda side=side: side.prove(SECRET) for side in (host.attendance, process)))


@pytest.mark.smoke
def test_a_crowd_of_strangers_changes_nothing():
    port, calls = free_port(), {}

    def join(index):
        calls[index] = RollCall("127.0.0.1", port, 4, index, 20)
        calls[index].prove(SECRET)

    with Strangers(port, 400) as strangers:
        together(lambda: join(0), lambda: (strangers.wait_for(150), join(1)),
                 lambda: join(2), lambda: (strangers.wait_for(350), join(3)))  # fmt: skip
        assert not any(call.wait_for_end(0.02) for call in calls.values())
        with pytest.raises(ConnectionRefusedError):  # nobody listens during the run
            socket.create_connection(("127.0.0.1", port))
    for call in calls.values():
        call.bye()


@pytest.mark.parametrize("line", [
    *LINES[1:5], LINES[7], b"null\n", b"{}\n", b'{"a":' * 400 + b"\n", b"{" * 3000, b"\x00\n",
    *({**HELLO, **odd} for odd in (
        {"index": True}, {"index": 1.0}, {"index": 0}, {"index": -1}, {"index": 2}, {"index": "1"},
        {"index": None}, {"count": "2"}, {"count": 3}, {"nonce": 5}, {"nonce": "n" * 65},
        {"index": int("9" * 1500), "count": int("9" * 1500) + 1},
    )),
], ids=range(22))  # fmt: skip
def test_who_says_nonsense_is_disconnected(host, monkeypatch, line):
    monkeypatch.setattr(attendance, "HELLO_S", 0.1)
    assert is_closed(host.stranger(line))
    assert host.attendance._claims == {1: []} and host.ends == []


def test_the_slow_hold_nobody_up(host, monkeypatch):
    monkeypatch.setattr(attendance, "HELLO_S", 0.3)
    lines = [host.stranger() for _ in range(20)]

    def drip():
        with contextlib.suppress(OSError):
            for byte in b'{"index": 1, "count": 2}' * 4:
                lines[0].sendall(bytes([byte]))
                time.sleep(0.03)

    began = time.monotonic()
    together(drip, lambda: prove(host, host.process()))
    assert all(map(is_closed, lines)) and time.monotonic() - began < 2


def test_the_silent_do_not_use_up_the_places(host):
    lines = [host.stranger() for _ in range(attendance._STRANGERS + 10)]
    assert all(map(is_closed, lines[:10]))  # the oldest leave, the newest is heard
    assert host.peer(SECRET) and len(host.attendance._strangers) <= attendance._STRANGERS


def test_a_liar_neither_displaces_a_process_nor_ends_the_run(host):
    liar = host.stranger(HELLO)
    host.attendance.gather()  # a claim counts as presence
    liar.sendall(b'{"end": "over", "code": 0}\n')
    liar.close()
    stays = host.stranger(HELLO)
    process = host.process()
    process.gather()
    prove(host, process)
    assert is_closed(stays) and host.ends == []
    process.send({"bye": True})


def test_a_process_that_is_crowded_out_comes_back(host):
    process = host.process()
    process.gather()
    crowd = [host.stranger(HELLO) for _ in range(2 * attendance._CLAIMS)]
    wait_for(lambda: 1 in host.attendance._crowded)
    for line in crowd:
        line.close()
    host.attendance.confirm()
    prove(host, process)
    assert host.ends == []


def test_where_only_strangers_came_the_absent_are_named():
    with contextlib.closing(Host(count=3, seconds=0.6)) as host:
        lines = [host.stranger({"index": i, "count": 3, "nonce": "n"}) for i in (1, 1, 2)]
        host.attendance.gather()
        for line in lines:
            line.close()
        assert host.end() == ("processes 1, 2 of 3 did not join within 0.6 s", 2)
    with contextlib.closing(Host(count=3, seconds=0.6)) as host:
        host.stranger(HELLO | {"count": 4}).close()
        lines = [host.stranger({"index": 1, "count": 3, "nonce": "n"}) for _ in range(2)]
        with pytest.raises(ConfigError) as error:
            host.attendance.gather()
        assert str(error.value) == (
            "process 2 of 3 did not join within 0.6 s; several claim to be process 1; process 1 of "
            "4 tried to join a run of 3 processes"
        )


def test_only_who_knows_the_secret_is_a_process(monkeypatch):
    with contextlib.closing(Host(seconds=0.4)) as host:
        liar = host.peer(b"another secret")
        liar.send({"here": True})
        with pytest.raises(ConfigError, match=r"process 1 of 2 did not prove within 0.4 s to be"):
            host.attendance.prove(SECRET)
        assert not host.attendance._proven
    with contextlib.closing(Host()) as host:
        process = Presence("127.0.0.1", host.port, 2, 1, 0.3, lambda *end: None)
        process.gather()
        with pytest.raises(ConfigError, match=r"process 0 did not prove within 0.3 s to be part"):
            process.prove(SECRET)


def sealed_here(peer: Peer) -> bytes:
    """The proof of a process, as somebody on the way records it."""
    text = json.dumps({"here": True}).encode()
    return peer._seal(False, text) + b" " + text + b"\n"


@pytest.mark.parametrize("later", [None, b'{"end": "over", "code": 2}\n', b"\n", b"x" * 3000])
def test_what_is_repeated_or_not_sealed_is_not_believed(host, later):
    peer = host.peer()
    proof = sealed_here(peer)
    peer._connection.sendall(proof)
    host.attendance.prove(SECRET)
    peer._connection.sendall(later or proof)
    assert host.end() == ("process 1 is gone", 1)


def test_a_recorded_proof_is_worth_nothing_on_another_connection():
    with contextlib.closing(Host(seconds=0.4)) as host:
        peer = host.peer()
        thief = host.stranger(HELLO | {"nonce": peer.nonce})
        thief.recv(4096)
        thief.sendall(sealed_here(peer))
        with pytest.raises(ConfigError, match="process 1 of 2 did not prove"):
            host.attendance.prove(SECRET)
        assert is_closed(thief)


@pytest.mark.parametrize("start", [b"", b"{", b'{"index": 1, "count": 2, "nonce": "'])
def test_the_huge_are_cut_short(host, monkeypatch, start):
    monkeypatch.setattr(attendance, "HELLO_S", 60)  # for their size, not their time
    assert is_closed(host.stranger(start + b"a" * 1_000_000))


@pytest.mark.parametrize(("message", "end"), [
    ({"end": "full", "code": 2}, ("process 1: full", 2)),
    ({"end": "ok", "code": 0}, ("process 1: ok", 1)),
    ({"end": "\x1b]0;x\x07\x1b[2J\r\nerror: \u202eno", "code": 2},
     ("process 1: \\x1b]0;x\\x07\\x1b[2J error: \\u202eno", 2)),
    ({"end": ["list"], "code": [1]}, ("process 1: ", 1)),
    (None, ("process 1 is gone", 1)),
])  # fmt: skip
@pytest.mark.parametrize("proven", [True, False])
def test_how_a_process_ends_the_others(host, message, end, proven):
    peer = host.peer()
    if not proven:  # in between, the processes that XLA's service has connected are missed as well
        peer._keys = {}
        host.attendance.confirm()
    else:
        peer.send({"here": True})
        host.attendance.prove(SECRET)
    if message:
        peer.send(message)
    peer.close()
    if not proven and end[0] == "process 1: ":
        end = ("process 1 is gone", 1)
    assert host.end() == end


def test_a_process_that_says_bye_is_not_missed_and_strangers_learn_nothing(host):
    stranger, peer = host.stranger(), host.peer()
    host.attendance.send({"end": "a path of ours", "code": 2})
    peer.send({"here": True})
    host.attendance.prove(SECRET)
    peer.send({"bye": True})
    peer.close()
    wait_for(lambda: not host.attendance._open)
    assert host.ends == [] and stranger.recv(4096) == b""


def test_codes_and_texts_of_others():
    assert [failure_code(c) for c in (1, 2, 255, 130)] == [1, 2, 255, 130]
    assert {failure_code(c) for c in (0, -1, 256, 512, True, False, None, "2", 2.0, [2])} == {1}
    text = foreign_text("\ud800é\x00\x9b" + "ä" * 9999)
    assert text.startswith("\\ud800é\\x00\\x9bää") and len(text.encode()) <= TEXT_BYTES + 3
    assert printable("a\n b\t\tc\x85d") == "a b c d"
    # The longest text still fits into a message.
    assert len(json.dumps({"end": foreign_text("\\" * 9999)})) < 1100


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 400 Bad Request\r\n", b"\x00" * 5000,
                                  b'{"all": 2}\n', b'{"all": 2, "nonce": 7}\n',
                                  b'{"index": 1, "count": 2, "nonce": "mine"}\n'])  # fmt: skip
def test_what_is_not_process_0_is_not_waited_for(monkeypatch, says):
    monkeypatch.setattr(presence, "_LATER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def answer():
            with contextlib.suppress(OSError):
                while True:
                    line, _ = server.accept()
                    lines.append(line)
                    line.sendall(says)

        lines = []
        threading.Thread(target=answer, daemon=True).start()
        began = time.monotonic()
        process = Presence("127.0.0.1", port, 2, 1, 0.2, lambda *end: None)
        with pytest.raises(ConfigError, match="does not behave like it"):
            process.gather()
        assert time.monotonic() - began < 2
        server.shutdown(socket.SHUT_RDWR)


def test_an_end_before_the_run_is_an_error_with_its_text_escaped():
    with contextlib.closing(Host(seconds=0.2, count=3)) as host:
        process = host.process()
        wait_for(lambda: host.attendance._claims[1])
        host.attendance.send({"end": "\x1b[1mno", "code": 0})
        with pytest.raises(ConfigError) as error:
            process.gather()
        assert str(error.value) == "\\x1b[1mno"


def test_process_0_listens_on_one_address(monkeypatch):
    def bound(host):
        with address.listen(host, 0, time.monotonic()) as server:
            return server.getsockname()[0]

    assert bound("127.0.0.1") == "127.0.0.1" and bound("localhost") in ("127.0.0.1", "::1")
    own = address.source_address(socket.AF_INET, "192.0.2.1")
    entries = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: entries)
    # A machine that lists its own name as a loopback address, as Debian does; without a network it
    # stays there.
    assert bound("node7") == (own or "127.0.1.1")
    assert address.addresses("node7", 1) == [(socket.AF_INET, own or "127.0.1.1")]
    # Behind address translation: the coordinator's address belongs to no interface.
    entries[0] = (*entries[0][:4], ("198.51.100.7", 0))
    monkeypatch.setattr(address, "source_address", lambda family, ip: "127.0.0.1")
    assert bound("published") == "127.0.0.1"
    monkeypatch.setattr(address, "source_address", lambda family, ip: None)
    with pytest.raises(ConfigError, match=r"cannot listen on port 0 of published, one above"):
        bound("published")


def test_a_port_in_use_and_an_unknown_host_are_named():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on port {port} of 127.0.0.1, one"):
            RollCall("127.0.0.1", port, 2, 0, 1)
    with pytest.raises(ConfigError, match=r"coordinator, no\.such\.host\.invalid, is unknown"):
        RollCall("no.such.host.invalid", port, 2, 0, 0.01)
