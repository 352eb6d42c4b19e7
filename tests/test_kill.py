"""Some of the kills that `python -m tests.kill` makes."""

import pytest

from genai_jax.tasks.registry import TASKS
from tests.kill import FAMILIES, kill_many


def test_every_family_is_killed():
    assert FAMILIES.keys() == TASKS.keys()


@pytest.mark.depends_on("whole runs")
def test_kills_change_no_value(tmp_path):
    summary = kill_many(9, ["language_model"], seed=0, folder=tmp_path)
    assert summary.differ == 0 and summary.compared > 150
    assert summary.while_saving == 3
