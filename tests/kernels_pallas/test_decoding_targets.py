"""The decoding kernels compile for every chip: no spills, no copy of the cache, and no more
instructions than they took."""

import pytest

from .decode_targets import BUDGETS, CASES, TPUS
from .target_process import budgets, check_bundles, need, report_of

SMALL = 16 << 20  # bytes; the keys of a contiguous cache are 256 MiB


@pytest.fixture(scope="module")
def compiled():
    need("libtpu")
    need("jax_cuda13_plugin")
    return report_of("decode_targets")


@pytest.mark.smoke
@pytest.mark.parametrize("name", [f"{kind}, {target}" for target in TPUS for kind in CASES])
def test_tpu(compiled, name):
    got = compiled["tpu"][name]
    assert got["spills"] == 0
    assert got["temporary"] < SMALL
    check_bundles(got, budgets(BUDGETS)[name])


@pytest.mark.smoke
@pytest.mark.parametrize("kind", CASES)
def test_h200(compiled, kind):
    got = compiled["gpu"][kind]
    assert got["spills"] == 0 and not got["serialized"]
    assert got["registers"] <= 255
    assert got["temporary"] < SMALL
