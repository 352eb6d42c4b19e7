"""Every choice of every flag of every family trains, alone or with others, and resumes."""

import json

import pytest

from genai_jax.tasks.registry import TASKS
from tests.every_flag import BASES, RECORD, candidates, family, in_runs, two_steps

CHOSEN = json.loads(RECORD.read_text(encoding="utf-8"))
RUNS = [(base, i) for base, chosen in CHOSEN.items() for i in range(len(chosen["runs"]))]
AGAIN = "run python -m tests.every_flag and read the difference"


@pytest.mark.depends_on("every flag")
@pytest.mark.parametrize(("base", "index"), RUNS)
def test_flags_go_together(base, index, tmp_path):
    two_steps(base, CHOSEN[base]["runs"][index], 1 + index % 2, str(tmp_path))


@pytest.mark.parametrize("name", sorted({base.split()[0] for base in BASES}))
def test_every_choice_is_in_a_run_or_refused_by_every_base(name):
    bases = family(f"{name} of any kind")
    chosen = in_runs(CHOSEN, bases)
    refused = {value for base in bases for value in CHOSEN[base]["refused"]} - chosen
    assert chosen | refused == {value for base in bases for value in candidates(base)}, AGAIN


def test_every_family_has_a_base():
    assert {base.split()[0] for base in BASES} == TASKS.keys()
