"""Whoever reads a command's output may leave, and may not know its characters."""

import os
import subprocess
import sys

import pytest

from genai_jax.standard_streams import message_stream
from tests.conftest import ROOT

LONG = "print('x' * 50, file=sys.{}, flush=True)"
COMMAND = """
import sys
from genai_jax import command
def main(argv):
    for _ in range(5000):
        {body}
    open(argv[0], "w").write("done")
    return {code}
command.run(main)
"""


def shell(line: str, body: str, done, code: int = 0, **environment) -> tuple[int, str]:
    """Runs a command within a line of shell; returns (its exit code, all that was printed)."""
    script = COMMAND.format(body=body, code=code)
    ours = os.environ | {"script": script, "py": sys.executable, "done": str(done)} | environment
    command = '"$py" -c "$script" "$done"'
    result = subprocess.run(
        ["bash", "-c", line.format(command) + "; exit ${PIPESTATUS[0]}"],
        env=ours, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return result.returncode, result.stdout.decode("latin-1")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("code", [0, 3])
def test_a_reader_that_leaves_stops_nothing(tmp_path, stream, code):
    pipe = "{} | head -1" if stream == "stdout" else "{} 2>&1 >/dev/null | head -1"
    got, said = shell(pipe, LONG.format(stream), tmp_path / "done", code)
    assert said == "x" * 50 + "\n"  # no message, no traceback
    assert got == (code or (141 if stream == "stdout" else 0))
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_streams_that_were_never_open(tmp_path, closed):
    body = LONG.format("stdout") + ";" + LONG.format("stderr")
    got, _ = shell("{} " + closed, body, tmp_path / "done")
    assert got == 0 and (tmp_path / "done").read_text() == "done"  # nothing else in the file


def test_a_full_disk_behind_stdout_is_one_line(tmp_path):
    got, said = shell("{} >/dev/full", LONG.format("stdout"), tmp_path / "done")
    assert got == 2 and said == (
        "error: cannot write to standard output: No space left on device\n"
    )


def test_a_full_disk_behind_stderr_stops_nothing(tmp_path):
    got, _ = shell("{} 2>/dev/full", LONG.format("stderr"), tmp_path / "done")
    assert got == 0 and (tmp_path / "done").exists()


def test_a_progress_bar_outlives_its_terminal(tmp_path):
    body = "import tqdm; bar = tqdm.tqdm(total=9, mininterval=0); bar.update(); bar.close()"
    got, _ = shell("{} 2>&1 >/dev/null | head -1", body, tmp_path / "done")
    assert got == 0 and (tmp_path / "done").exists()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_characters_that_the_encoding_lacks_are_escaped(tmp_path, encoding):
    text = r"print('caf\u00e9 \u2603 \udcff')"
    got, said = shell("{} | tail -1", text, tmp_path / "done", PYTHONIOENCODING=encoding)
    expected = "caf\u00e9 \u2603 \udcff\n".encode(encoding, "backslashreplace")
    assert got == 0 and said.encode("latin-1") == expected


def test_messages_go_to_stdout_in_a_notebook(monkeypatch):
    """Notebooks mark stderr as an error; a terminal, a script, and a pipeline keep stdout clean."""
    assert message_stream() is sys.stderr
    monkeypatch.setattr(sys, "ps1", "In: ", raising=False)
    assert message_stream() is sys.stdout
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert message_stream() is sys.stderr
