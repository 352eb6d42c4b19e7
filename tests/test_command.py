"""What a command sets up before jax starts."""

import os
import re
import subprocess
import sys

import jax
import pytest

from genai_jax import command
from genai_jax.config import ConfigError
from tests.conftest import ROOT
from tests.fuzz_calls import COMMANDS


def test_simulated_devices_get_threads_for_collectives_that_overlap(monkeypatch):
    def threads(**environment) -> str | None:
        monkeypatch.setattr(os, "environ", environment)  # nothing may be left for other tests
        command._give_simulated_devices_threads()
        return environment.get("NPROC")

    assert threads() is None and threads(JAX_NUM_CPU_DEVICES="1") is None
    assert threads(JAX_NUM_CPU_DEVICES="8") == "64"
    assert threads(JAX_NUM_CPU_DEVICES="8", NPROC="5") == "5"  # the user's choice stays


@pytest.mark.parametrize(
    ("problem", "line"),
    [
        (ConfigError("--a=\x1b[31m\n is not\tallowed"), "error: --a=\\x1b[31m is not allowed\n"),
        (FileNotFoundError(2, "No such file", "a/b"), "error: a/b: No such file\n"),
        (OSError("odd"), "error: odd\n"),
        (ConfigError("--a=\u202eé"), "error: --a=\\u202eé\n"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory: 9 bytes.\nmore"),
            "error: out of memory: RESOURCE_EXHAUSTED: Out of memory: 9 bytes.\n",
        ),
        (MemoryError(), "error: out of memory: MemoryError\n"),
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


def test_devices_that_jax_cannot_start_are_one_line(monkeypatch, capsys):
    start = compile("raise AssertionError", "/jax/_src/xla_bridge.py", "exec")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    monkeypatch.setattr(sys, "argv", ["train"])
    with pytest.raises(SystemExit) as stop:
        command.run(lambda argv: exec(start))
    said = "error: jax cannot start the devices of JAX_PLATFORMS=cuda: AssertionError\n"
    assert stop.value.code == 2 and capsys.readouterr().err == said


@pytest.mark.parametrize("value", ["many", ""])
def test_an_environment_that_jax_cannot_read_is_one_line(value):
    """jax reads it when it is imported, before any flag is."""
    result = subprocess.run(
        [sys.executable, "-m", "genai_jax.evaluate", "--help"],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": value}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: jax cannot read its environment variables: ")
    assert "jax_num_cpu_devices" in result.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_leaves_the_first_import_of_jax_to_the_module_that_guards_it(name):
    lines = (ROOT / "genai_jax" / f"{name}.py").read_text().splitlines()
    assert not [line for line in lines if re.match(r"(import|from) (jax|flax|optax)\b", line)]


def test_ctrl_c_during_the_imports_needs_no_traceback(capsys):
    error = KeyboardInterrupt()
    command._quiet_if_interrupted(KeyboardInterrupt, error, None)
    assert capsys.readouterr().err == ""
    command._quiet_if_interrupted(ValueError, ValueError("a bug"), None)
    assert "ValueError: a bug" in capsys.readouterr().err
