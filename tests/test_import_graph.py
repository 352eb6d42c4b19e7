"""Imports point one way: no circle, no upward arrow, nothing imports a command."""

import pathlib
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.import_graph import circles, graph

# From the bottom up: a module may import what is in its own layer or in one below it. The first
# prefix that matches decides.
LAYERS = (
    ("kernels_pallas", 0),
    ("genai_jax.config", 1),
    ("genai_jax.errors", 1),
    ("genai_jax.files", 1),
    ("genai_jax.outside", 1),
    ("genai_jax.flagfiles", 1),
    ("genai_jax.shipped", 1),
    ("genai_jax.tasks.protocol", 1),  # contracts, without any family
    ("genai_jax.tasks.registry", 1),
    ("genai_jax.requests", 1),
    ("genai_jax.sampled", 1),
    ("genai_jax.media", 1),
    ("genai_jax.grids", 1),
    ("genai_jax.heat_map", 1),
    ("genai_jax.standard_streams", 1),
    ("genai_jax.networks", 2),
    ("genai_jax.diffusion", 2),
    ("genai_jax.decoding", 2),
    ("genai_jax.data", 2),
    ("genai_jax.metrics", 2),
    ("genai_jax.losses", 3),
    ("genai_jax.training", 4),
    ("genai_jax.components", 5),
    ("genai_jax.moved_flags", 5),
    ("genai_jax.outside_flags", 5),
    ("genai_jax.keyword_flags", 6),
    ("genai_jax.other_data", 6),
    ("genai_jax.scaling", 6),
    ("genai_jax.tasks", 6),
    ("genai_jax.callable_commands", 7),
    ("genai_jax.command", 7),
    ("genai_jax.trainer", 7),
    ("genai_jax.inspection", 7),
    ("genai_jax.runs", 7),
)
COMMANDS = {
    f"genai_jax.{path.stem}"
    for path in (ROOT / "genai_jax").glob("*.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
}


def layer(module: str) -> int:
    if module in COMMANDS:
        return 8
    for prefix, number in LAYERS:
        if module == prefix or module.startswith(prefix + "."):
            return number
    assert module in ("genai_jax", "genai_jax.tasks"), f"{module} has no layer"
    return 0  # packages that are empty


@pytest.fixture(scope="module")
def edges():
    return graph()


def test_there_is_no_circle(edges):
    assert circles(edges) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c"]]


def test_no_arrow_points_upward(edges):
    assert {"genai_jax.train", "genai_jax.sample", "genai_jax.evaluate"} <= COMMANDS
    upward = [f"{a} -> {b}" for a in edges for b in edges[a] if layer(b) > layer(a)]
    assert upward == []


def test_nothing_imports_a_command(edges):
    assert [f"{a} -> {b}" for a in edges for b in edges[a] & COMMANDS] == []


def test_scaling_and_training_know_no_family_and_families_know_no_scaling(edges):
    families = {m for m in edges if m.startswith("genai_jax.tasks.") and layer(m) == 6}
    for module, used in edges.items():
        if module.startswith(("genai_jax.scaling", "genai_jax.training", "genai_jax.components")):
            assert not used & families, module
        if module in families:
            assert not [m for m in used if m.startswith("genai_jax.scaling")], module


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_registry_imports_no_jax():
    assert run("import sys, genai_jax.tasks.registry; print('jax' in sys.modules)") == "False"


def test_help_imports_only_the_task_that_is_named():
    code = (
        "import sys, genai_jax.train as t; t.main(['--help', '--task={}']); "
        "print(sorted(m for m in sys.modules if m.startswith('genai_jax.tasks.')))"
    )
    listed = run(code.format("rbm")).splitlines()[-1]
    assert "energy.rbm" in listed
    assert not any(word in listed for word in ("language", "diffusion", "gan", "vae", "flow"))


def test_no_file_is_over_400_lines():
    folders = ("genai_jax", "tests", "benchmarks", "experiments")
    long = {
        str(path.relative_to(ROOT)): lines
        for folder in folders
        for path in pathlib.Path(ROOT / folder).rglob("*.py")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert long == {}
