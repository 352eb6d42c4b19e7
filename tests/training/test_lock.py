"""Two processes never write into one workdir."""

import subprocess
import sys

import pytest

from genai_jax import train
from genai_jax.config import ConfigError
from genai_jax.training.lock import locked
from tests.commands import TINY
from tests.conftest import ROOT


def test_a_run_refuses_a_workdir_in_which_another_process_trains(tmp_path, text_folder):
    code = (
        "import time\nfrom genai_jax.training.lock import locked\n"
        f"with locked({str(tmp_path)!r}, 'run'):\n"
        "    print('locked', flush=True)\n    time.sleep(99)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(ConfigError, match=f"in use by process {other.pid} on .*, a run in"):
            train.main([*TINY, f"--data.dataset=text:{text_folder}", f"--workdir={tmp_path}"])
        assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
    finally:
        other.kill()
        other.communicate()
    with locked(tmp_path, "run"):  # the kernel has released it
        pass


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with locked(tmp_path, "run"):
        assert "cannot be locked: No locks available" in capsys.readouterr().err
