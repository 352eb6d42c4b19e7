"""The notebooks: executed from a clean kernel in the small setting, and stored in the full one."""

import os
import re
import resource

import pytest

from tests.commands import environment
from tests.conftest import ROOT

pytest.importorskip("nbclient")
from colabs import run as runner

NAMES = runner.names()
LARGEST = 1_500_000  # bytes of a notebook
SECONDS = 300  # of a cell, on a machine that does other things, too
PROCESSOR_SECONDS = 160  # of a notebook: a minute on two cores


def codes(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.depends_on("whole runs")
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_from_a_clean_kernel(name, tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = runner.execute(
        runner.read(name), tmp_path, small=True, environment=environment(), timeout_s=SECONDS
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert used < PROCESSOR_SECONDS, f"{name} used {used:.0f} s of processor time"
    assert "small setting" in str(codes(done)[-1].outputs)
    assert not any(output.output_type == "error" for cell in codes(done) for output in cell.outputs)


@pytest.mark.parametrize("name", NAMES)
def test_the_stored_outputs_are_those_of_the_full_setting(name):
    notebook = runner.read(name)
    assert os.path.getsize(runner.path_of(name)) < LARGEST
    cells = codes(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    assert not list(runner.machine_paths(notebook, ROOT))
    assert notebook.metadata.get("executed") == runner.sources_hash(notebook), (
        f"{name} has changed since it was executed: python -m colabs.run {name}"
    )
    said = "".join(output.text for output in cells[-1].outputs if "text" in output)
    lines = (
        r"\d{4}-\d\d-\d\d, full setting",
        r"genai_jax [0-9a-f]{40}",
        r"Python 3\.\d+\.\d+, .*jax 0\.",
    )
    for line in lines:
        assert re.search(f"^{line}", said, re.MULTILINE), f"{name}: its last cell lacks {line!r}"
    assert "-dirty" not in said, f"{name}: execute it in a clone without changes"
    drawn = sum("image/png" in o.get("data", {}) for cell in cells for o in cell.outputs)
    assert drawn >= sum("plt.show()" in cell.source for cell in cells) and drawn


def test_all_begin_and_end_alike():
    assert len(NAMES) >= 1
    first = {codes(runner.read(name))[0].source for name in NAMES}
    last = {codes(runner.read(name))[-1].source for name in NAMES}
    assert len(first) == len(last) == 1
    (source,) = first
    assert "GENAI_JAX_SMALL" in source and "pip" in source
    for name in NAMES:
        cells = codes(runner.read(name))[1:-1]
        assert any("SMALL" in cell.source for cell in cells), f"{name} has no small setting"


def test_a_path_of_this_machine_is_an_error(tmp_path):
    import nbformat

    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("import os\nprint(os.getcwd())")]
    )
    with pytest.raises(ValueError, match="outputs name folders of this machine"):
        runner.execute(notebook, tmp_path, small=True, timeout_s=SECONDS)
