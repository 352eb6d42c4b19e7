"""The TPU kernels compile for every chip, take no more instructions than they did, and no memory
that grows with the square of the length."""

import pytest

from .target_process import GROWTH, asked, budgets, cases, check_bundles, need, report_of
from .tpu_targets import BUDGETS, CASES, LONG_HEADS, LONG_LENGTH

pytestmark = pytest.mark.depends_on("kernels")


@pytest.fixture(scope="module")
def compiled(request):
    need("libtpu")
    return report_of("tpu_targets", *asked(request, "name"))


@pytest.mark.parametrize("name", cases(CASES, smoke="causal, grouped, v6e"))
def test_no_more_bundles_than_recorded(compiled, name):
    got = compiled[name]
    want = budgets(BUDGETS)[name]
    check_bundles(got, want)
    assert got["spills"] <= GROWTH * want["spills"]


def test_no_buffer_of_the_square_of_the_length():
    need("libtpu")
    long = report_of("tpu_targets", "long")
    assert long["largest"] <= LONG_HEADS * LONG_LENGTH * 128 < LONG_LENGTH**2
    assert long["temporary"] < LONG_LENGTH**2
