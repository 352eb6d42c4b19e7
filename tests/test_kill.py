"""A dozen of the kills that `python -m tests.kill` makes."""

from tests.kill import kill_many


def test_a_dozen_kills_change_no_value(tmp_path):
    summary = kill_many(12, ["language_model"], seed=0, folder=tmp_path)
    assert summary.differ == 0 and summary.compared > 200
    assert summary.while_saving == 4
