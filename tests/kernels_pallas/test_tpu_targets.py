"""The TPU kernels compile for every chip, take no more instructions than they did, and no memory
that grows with the square of the length."""

import pytest

from .tpu_targets import (
    CASES,
    COMPILERS,
    LONG_HEADS,
    LONG_LENGTH,
    VERSION,
    budgets,
    in_a_process,
)

NAMES = [
    f"{case}, {target}, {kernel}"
    for case, (targets, *_) in CASES.items()
    for target in targets
    for kernel in ("forward", "backward")
]
GROWTH = 1.03


@pytest.fixture(scope="module")
def compiled():
    if not (COMPILERS / "libtpu").is_dir():
        pytest.skip(f"no TPU compiler in {COMPILERS}: `make targets`")
    return in_a_process()


@pytest.mark.smoke
@pytest.mark.parametrize("name", NAMES)
def test_no_more_bundles_than_recorded(compiled, name):
    got = compiled["kernels"][name]
    recorded = budgets().get(VERSION)
    if recorded is None:
        pytest.skip(
            f"no budgets for {VERSION}: python -m tests.kernels_pallas.tpu_targets --record"
        )
    want = recorded[name]
    assert len(got["bodies"]) == len(want["bodies"])
    for bundles, budget in zip(got["bodies"], want["bodies"], strict=True):
        assert bundles <= GROWTH * budget
    assert got["always"] <= GROWTH * want["always"]
    assert got["spills"] <= GROWTH * want["spills"]


def test_no_buffer_of_the_square_of_the_length(compiled):
    long = compiled["long"]
    assert long["largest"] <= LONG_HEADS * LONG_LENGTH * 128 < LONG_LENGTH**2
    assert long["temporary"] < LONG_LENGTH**2
