"""Time in which four processes join, with and without 1,000 connections of strangers.

    python -m benchmarks.roll_call

Rounds alternate between the two. Four processes begin to join at the same moment, everything
imported; the time ends when the last one has joined. "join" is all of `join_processes`, "roll_call"
the roll call alone, without jax. The strangers, a process of low priority as if on another machine,
try to connect before anybody listens, until all connections were opened or nobody listens any more.
Prints a JSON object with the medians in milliseconds, their ratio, and the number of connections.
"""

import contextlib
import dataclasses
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time

from genai_jax.training.distributed import DistributedConfig, join_processes
from genai_jax.training.roll_call import RollCall

PROCESSES, CONNECTIONS = 4, 1000
ROUNDS = {"roll_call": 11, "join": 5}
LINES = (  # what strangers say; the first says nothing
    b"",
    b"GET / HTTP/1.1\r\n\r\n",
    b"\xff" * 65_536,
    b"[" * 1500 + b"\n",
    b'{"index": [1], "count": 4}\n',
    b'{"index": 1, "count": 4, "nonce": "liar"}\n',
    b'{"index": 1, "count": 4, "nonce": "liar"}\n{"end": "\\u001b[2J", "code": 0}\n',
    b'{"end": "over", "code": 0}\n',
    b'{"ind',
)


class Strangers:
    """Connections to a port that come from nobody of the run, opened while this context lasts.

    Args:
      port: on 127.0.0.1.
      count: how many connections to open, and to keep open as long as the other end does.
      pause_s: from one to the next.
    """

    def __init__(self, port: int, count: int, pause_s: float = 0.0):
        self._port, self._count, self._pause_s = port, count, pause_s
        self._over = threading.Event()
        self._lines: list[socket.socket] = []
        self._thread = threading.Thread(target=self._connect, daemon=True)
        self.opened = 0

    def __enter__(self) -> "Strangers":
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()
        for line in self._lines:
            line.close()

    def wait_for(self, count: int):
        """Waits until so many connections were opened."""
        while self.opened < count:
            time.sleep(0.001)

    def _connect(self):
        while not self._over.wait(self._pause_s) and self.opened < self._count:
            try:
                line = socket.create_connection(("127.0.0.1", self._port), timeout=1)
            except OSError:  # nobody listens, or not any more
                time.sleep(0.005)
                continue
            self._lines.append(line)
            line.setblocking(False)
            with contextlib.suppress(OSError):
                line.send(LINES[self.opened % len(LINES)])
            self.opened += 1


def take_part(what: str, index: int):
    """Joins at the port and the time that standard input names, and prints the time at its end."""
    config = DistributedConfig(process_id=index, num_processes=PROCESSES)
    print(0, file=sys.stderr)  # ready
    for line in sys.stdin:
        port, begin = line.split()
        time.sleep(max(float(begin) - time.time(), 0))
        if what == "join":
            place = dataclasses.replace(config, coordinator=f"127.0.0.1:{int(port) - 1}")
            with join_processes(place):
                print(time.time(), file=sys.stderr)
            return
        call = RollCall("127.0.0.1", int(port), PROCESSES, index, 60)
        call.prove(b"a secret")
        print(time.time(), file=sys.stderr)
        call.bye()


def be_strangers():
    """Connects to each port that standard input names, until the next line comes."""
    os.nice(19)
    print(0, file=sys.stderr)
    for line in sys.stdin:
        with Strangers(int(line), CONNECTIONS) as strangers:
            sys.stdin.readline()
        print(strangers.opened, file=sys.stderr)


def start(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "benchmarks.roll_call", *arguments]
    ours = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    pipes = dict(stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1)
    process = subprocess.Popen(command, env=os.environ | ours, **pipes)
    number(process)
    return process


def number(process: subprocess.Popen) -> float:
    """The next number that the process prints, between the lines of XLA."""
    while True:
        line = process.stderr.readline()
        assert line, "a process ended"
        with contextlib.suppress(ValueError):
            return float(line)


def milliseconds(processes: list[subprocess.Popen], crowd: subprocess.Popen | None) -> float:
    """The time of one round; with `crowd`, strangers connect as well."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    if crowd:
        print(port, file=crowd.stdin)
    begin = time.time() + 0.3
    for process in processes:
        print(port, begin, file=process.stdin)
    return 1e3 * (max(map(number, processes)) - begin)


def compare(what: str, rounds: int, crowd: subprocess.Popen) -> dict:
    """Medians of both sides, and the median ratio over rounds."""
    times, opened, processes = {"quiet": [], "strangers": []}, [], []
    for turn in range(2 * rounds + 2):
        name = ("quiet", "strangers")[turn % 2]
        if not processes or what == "join":  # jax.distributed connects once in a process
            processes = [start(what, str(i)) for i in range(PROCESSES)]
        ms = milliseconds(processes, crowd if name == "strangers" else None)
        if name == "strangers":
            print(file=crowd.stdin)
            opened.append(number(crowd))
        if what == "join":
            finish(processes)
        if turn > 1:  # the first of each warms up
            times[name].append(ms)
    finish(processes)
    ratios = [b / a for a, b in zip(times["quiet"], times["strangers"], strict=True)]
    return {
        **{f"{name}_ms": round(statistics.median(ms), 1) for name, ms in times.items()},
        "ratio": round(statistics.median(ratios), 3),
        "connections_of_strangers": statistics.median(opened),
    }


def finish(processes: list[subprocess.Popen]):
    for process in processes:
        process.communicate()


def main() -> dict:
    crowd = start("strangers")
    results = {what: compare(what, rounds, crowd) for what, rounds in ROUNDS.items()}
    finish([crowd])
    return results


if __name__ == "__main__":
    if sys.argv[1:] == ["strangers"]:
        be_strangers()
    elif sys.argv[1:]:
        take_part(sys.argv[1], int(sys.argv[2]))
    else:
        print(json.dumps(main(), indent=2))
