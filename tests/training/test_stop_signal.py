"""Signals that come together count as one; one that comes again later ends the process."""

import os
import signal
import subprocess
import sys
import time

import pytest

from genai_jax.training.stop_signal import StopSignal
from tests.conftest import ROOT

HUP, INT, TERM = signal.SIGHUP, signal.SIGINT, signal.SIGTERM


@pytest.mark.parametrize(
    "signals", [(HUP, HUP), (INT, TERM), (TERM, INT), (TERM, TERM), (INT, INT, HUP, TERM)]
)
def test_the_first_of_several_counts(signals):
    before = [signal.getsignal(number) for number in (HUP, INT, TERM)]
    with StopSignal() as stop:
        assert stop.ask() is None
        for number in signals:
            os.kill(os.getpid(), number)
        time.sleep(0.05)  # for the thread
        assert stop.ask() == stop.agreed == signals[0]
    assert [signal.getsignal(number) for number in (HUP, INT, TERM)] == before


def test_nohup_stays():
    before = signal.signal(HUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), HUP)
            assert stop.ask() is None
    finally:
        signal.signal(HUP, before)


@pytest.mark.parametrize(("number", "ends"), [(INT, True), (TERM, True), (HUP, False)])
def test_the_same_signal_again_ends_a_process_that_waits_outside_python(number, ends):
    code = (
        "import ctypes; from genai_jax.training.stop_signal import StopSignal\n"
        "with StopSignal():\n"
        "    print(flush=True)\n"
        "    libc = ctypes.CDLL(None)\n"
        "    lock = ctypes.create_string_buffer(64)\n"
        "    libc.sem_init(lock, 0, 0)\n"
        "    libc.alarm(20)\n"
        "    while True: libc.sem_wait(lock)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.readline()
    for _ in range(2):
        process.send_signal(number)
        time.sleep(0.6)
    if not ends:
        assert process.poll() is None
        process.kill()
    _, said = process.communicate(timeout=10)
    assert process.returncode == (128 + number if ends else -signal.SIGKILL)
    assert said == (b"ended at once by a second signal\n" if ends else b"")
