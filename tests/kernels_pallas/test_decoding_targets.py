"""The decoding kernels compile for every chip: no spills, no copy of the cache, and no more
instructions than they took."""

import pytest

from .decode_targets import BUDGETS, CASES
from .target_process import asked, budgets, cases, check_bundles, need, report_of

pytestmark = pytest.mark.depends_on("kernels")

ON_TPU = [name for name in CASES if not name.endswith("h200")]
ON_GPU = [name for name in CASES if name.endswith("h200")]

SMALL = 16 << 20  # bytes; the keys of a contiguous cache are 256 MiB


@pytest.fixture(scope="module")
def compiled(request):
    need("libtpu")
    need("jax_cuda13_plugin")
    return report_of("decode_targets", *asked(request, "name"))


@pytest.mark.parametrize("name", cases(ON_TPU, smoke="v6e"))
def test_tpu(compiled, name):
    got = compiled[name]
    assert got["spills"] == 0
    assert got["temporary"] < SMALL
    check_bundles(got, budgets(BUDGETS)[name])


@pytest.mark.parametrize("name", cases(ON_GPU, smoke="paged"))
def test_h200(compiled, name):
    got = compiled[name]
    assert got["spills"] == 0 and not got["serialized"]
    assert got["registers"] <= 255
    assert got["temporary"] < SMALL
