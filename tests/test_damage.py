"""A sample of the cells of `tests.damage`, which has them all."""

import json
import subprocess
import sys

from tests.commands import environment
from tests.conftest import ROOT

CELLS = 30
READ_ELSEWHERE = "metrics.jsonl"


def test_commands_end_well_whatever_lies_in_a_run(tmp_path):
    """In a process of its own: what waits in native code can only be ended from outside."""
    options = (f"--cells={CELLS}", f"--leave_out={READ_ELSEWHERE}")
    result = subprocess.run(
        [sys.executable, "-m", "tests.damage", str(tmp_path / "work"), *options],
        env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    cells = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"file"')]
    assert [cell for cell in cells if cell["ending"] not in ("ok", "refused")] == []
    assert len(cells) == CELLS and {cell["ending"] for cell in cells} == {"ok", "refused"}
