"""The Hopper kernels compile for an H200, keep what they compute with in registers, and take no
memory that grows with the square of the length."""

import pytest

from .gpu_targets import CASES, COMPILERS, LONG_HEADS, LONG_LENGTH, in_a_process

BACKWARD = {d: ("queries", "keys_and_values") for d in (64, 96, 128)}
BACKWARD |= {d: ("queries", "keys", "values") for d in (192, 256)}
NAMES = [
    f"{case}, flash_attention_{kernel}"
    for case, (_, head_dim, _) in CASES.items()
    for kernel in ("forward", *(f"backward_{role}" for role in BACKWARD[head_dim]))
]


@pytest.fixture(scope="module")
def compiled():
    if not (COMPILERS / "jax_plugins").is_dir():
        pytest.skip(f"no CUDA compiler in {COMPILERS}: `make targets`")
    return in_a_process()


@pytest.mark.smoke
@pytest.mark.parametrize("name", NAMES)
def test_no_spills_and_no_waits_between_matmuls(compiled, name):
    got = compiled["kernels"][name]
    assert got["spills"] == 0
    # 65,536 registers a thread block of 384 threads; the loading warpgroup gives its own away.
    assert got["registers"] <= 168
    assert not got["serialized"]


def test_no_buffer_of_the_square_of_the_length(compiled):
    long = compiled["long"]
    assert long["largest"] <= LONG_HEADS * LONG_LENGTH * 128 < LONG_LENGTH**2
    assert long["temporary"] < LONG_LENGTH**2
