"""What a run says at its beginning, for data of any kind."""

import pytest

from genai_jax.components import parse_run
from genai_jax.training.announcements import beginning

RECORD = {
    "parameters": {"total": 1200, "active": 1200},
    "flops_per_step": 3e9,
    "mesh": {},
    "devices": 1,
    "device_kind": "cpu",
    "peak": None,
}


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"dataset": "digits", "train": "digits[train]"}, "digits[train]; "),
        ({"dataset": "digits", "train": ""}, "digits; "),
        ({"dataset": "two\nlines \x1b"}, "two lines \\x1b; "),
        ({"sha256": "of something else"}, ""),
        ({}, ""),
    ],
)
def test_the_data_are_named_if_their_record_names_them(data, named):
    config = parse_run(["--task=tests.toy_tasks:Linear", "--train.steps=1000"])
    first, second = beginning(config, RECORD | {"data": data}, 8, None).splitlines()
    what = "tests.toy_tasks:Linear: 1,200 parameters; "
    assert first == f"{what}{named}1,000 steps of 8 examples"
    assert second == "1 cpu device(s); 3e+09 FLOPs per step"
