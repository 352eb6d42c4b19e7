"""The Hopper kernels compile for an H200, keep what they compute with in registers, and take no
memory that grows with the square of the length."""

import pytest

from .gpu_targets import CASES, LONG_HEADS, LONG_LENGTH
from .target_process import asked, cases, need, report_of

pytestmark = pytest.mark.depends_on("kernels")

# Bytes of a thread that do not fit into its 240 registers, of which the sums take 128 here; 12
# bytes with jax 0.10.2.
SPILLS = {"head dim 256, flash_attention_backward_keys": 32}
EVERY = ("forward", "backward_queries")
TOGETHER, APART = ("backward_keys_and_values",), ("backward_keys", "backward_values")


@pytest.fixture(scope="module")
def compiled(request):
    need("jax_cuda13_plugin")
    return report_of("gpu_targets", *asked(request, "case"))


@pytest.mark.parametrize("case", cases(CASES, smoke="everything"))
def test_no_spills_and_no_waits_between_matmuls(compiled, case):
    got = {n: report for n, report in compiled.items() if n.startswith(f"{case}, flash")}
    apart = CASES[case][1] > 128 or case == "everything"
    kernels = EVERY + (APART if apart else TOGETHER)
    assert set(got) == {f"{case}, flash_attention_{kernel}" for kernel in kernels}
    for name, report in got.items():
        assert report["spills"] <= SPILLS.get(name, 0)
        # 65,536 registers by 384 threads; the loading warpgroup gives most of its own away.
        assert report["registers"] <= 168
        assert not report["serialized"]


def test_no_buffer_of_the_square_of_the_length():
    need("jax_cuda13_plugin")
    long = report_of("gpu_targets", "long")
    assert long["largest"] <= LONG_HEADS * LONG_LENGTH * 128 < LONG_LENGTH**2
    assert long["temporary"] < LONG_LENGTH**2
    assert long["transposes"] == 0  # of the swaps to heads-major and back
