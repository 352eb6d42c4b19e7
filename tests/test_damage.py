"""A sample of the cells of `tests.damage`, which has them all."""

import json
import pathlib
import subprocess
import sys
import tempfile

from tests.commands import environment
from tests.conftest import ROOT

CELLS = 24
# The older checkpoint is like the newer one, and orbax's markers are empty. metrics.jsonl has tests
# of its own.
LEFT_OUT = "checkpoints/2,commit_success"


def test_commands_end_well_whatever_lies_in_a_run():
    """In a process of its own: what waits in native code can only be ended from outside."""
    with tempfile.TemporaryDirectory() as work:
        pathlib.Path(work).chmod(0o755)  # without permissions, the process still gets this far
        result = subprocess.run(
            [sys.executable, "-m", "tests.damage", work, f"--cells={CELLS}",
             f"--leave_out={LEFT_OUT}"],
            env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    assert result.returncode == 0, result.stderr
    cells = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"file"')]
    assert [cell for cell in cells if cell["ending"] not in ("ok", "refused")] == []
    assert len(cells) == CELLS and {cell["ending"] for cell in cells} == {"ok", "refused"}
