"""The golden files; ``make golden`` writes them anew."""

import json

import pytest

from tests.golden_values import GOLDEN, PLACED, STEP_FLAGS, flagfiles, one_step, placed, resolved


@pytest.mark.smoke
def test_every_flagfile_resolves_to_its_golden_dump():
    for name, path in flagfiles().items():
        assert (GOLDEN / name).read_text() == resolved(path), f"{path}: see make golden"
    assert {p.name for p in GOLDEN.glob("*.flags")} == set(flagfiles())


@pytest.mark.parametrize("name", PLACED)
def test_every_parameter_of_a_pod_experiment_is_placed_as_before(name):
    assert (GOLDEN / f"{name}.shardings").read_text() == placed(name), "see make golden"


@pytest.mark.smoke
@pytest.mark.parametrize("name", STEP_FLAGS)
def test_one_step_gives_the_golden_numbers(name):
    golden = json.loads((GOLDEN / "one_step.json").read_text())[name]
    assert one_step(STEP_FLAGS[name]) == pytest.approx(golden, rel=2e-4)
