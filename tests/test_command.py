"""What a command sets up before jax starts."""

import os
import sys

import jax
import pytest

from genai_jax import command
from genai_jax.config import ConfigError


def test_simulated_devices_get_threads_for_collectives_that_overlap(monkeypatch):
    monkeypatch.delenv("NPROC", raising=False)
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    command._give_simulated_devices_threads()
    assert "NPROC" not in os.environ

    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")
    command._give_simulated_devices_threads()
    assert os.environ["NPROC"] == "64"

    monkeypatch.setenv("NPROC", "5")  # the user's choice stays
    command._give_simulated_devices_threads()
    assert os.environ["NPROC"] == "5"


@pytest.mark.parametrize(
    ("problem", "line"),
    [
        (ConfigError("--a=\x1b[31m\n is not\tallowed"), "error: --a=\\x1b[31m is not allowed\n"),
        (ConfigError("--a=\u202eé"), "error: --a=\\u202eé\n"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory: 9 bytes.\nmore"),
            "error: out of memory: RESOURCE_EXHAUSTED: Out of memory: 9 bytes.\n",
        ),
    ],
)
def test_a_mistake_ends_with_one_line_that_no_terminal_obeys(problem, line, monkeypatch, capsys):
    def main(argv):
        raise problem

    monkeypatch.setattr(sys, "argv", ["train"])
    with pytest.raises(SystemExit) as stop:
        command.run(main)
    assert stop.value.code == 2 and capsys.readouterr().err == line


def test_a_bug_keeps_its_traceback(monkeypatch):
    def main(argv):
        raise RuntimeError("a bug")

    monkeypatch.setattr(sys, "argv", ["train"])
    with pytest.raises(RuntimeError, match="a bug"):
        command.run(main)
