"""The sequence and stage axes change where things are computed, and nothing else."""

import pytest

from tests.commands import report_of

pytestmark = pytest.mark.depends_on("whole runs")

REFUSALS = {
    "length": "length 20 is not divisible by mesh axis `sequence` of size 8",
    "zigzag": "length 24 is not divisible by twice mesh axis `sequence` of size 8",
    "layers": "6 layers are not divisible by 4: mesh axis `stage` of size 4 x 1 repeats",
    "microbatches": "8 rows is not divisible by 4 microbatches x 4 device(s)",
    "repeats": "at least as many microbatches as stages: mesh axis `stage` of size 4, but 2",
    "experts": "mesh axis `stage` of size 2: a mixture of experts cannot run as a pipeline",
    "unused": "--mesh.sequence=2 splits nothing in this task",
}


@pytest.fixture(scope="module")
def report() -> dict:
    return report_of("networks/parallel/eight_devices_parallel.py")


def test_eight_devices_equal_one_in_the_whole_state(report):
    """Two steps on packed rows with windows and soft caps, and of a diffusion transformer."""
    assert len(report["differences"]) == 7
    for name, difference in report["differences"].items():
        assert difference < 5e-6, (name, report["differences"])


def test_the_length_stays_split_in_the_compiled_step(report):
    facts = report["mixed"]
    assert facts["whole_lengths"] == []
    assert facts["sent"] > 0


def test_the_output_embedding_is_gathered_once_and_not_for_every_chunk(report):
    (name,) = report["mixed"]["heads"]
    assert "while" not in name


def test_a_pipeline_is_its_layers(report):
    """In values and gradients, plain and circular."""
    assert len(report["pipelines"]) == 3
    assert max(report["pipelines"]) < 1e-5, report["pipelines"]


def test_a_pipeline_of_a_pattern_is_its_periods(report):
    assert report["hybrid"] < 1e-5


@pytest.mark.parametrize("name", REFUSALS)
def test_what_an_axis_does_not_divide_is_named(report, name):
    assert REFUSALS[name] in report["refused"][name]
