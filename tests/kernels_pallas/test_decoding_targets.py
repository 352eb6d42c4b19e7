"""The decoding kernels compile for every chip: no spills, no copy of the cache, and no more
instructions than they took."""

import pytest

from .decode_targets import CASES, COMPILERS, TPUS, VERSION, budgets, in_a_process

GROWTH = 1.03
SMALL = 16 << 20  # bytes; the keys of a contiguous cache are 256 MiB


@pytest.fixture(scope="module")
def compiled():
    for package in ("libtpu", "jax_plugins"):
        if not (COMPILERS / package).is_dir():
            pytest.skip(f"no {package} in {COMPILERS}: `make targets`")
    return in_a_process()


@pytest.mark.smoke
@pytest.mark.parametrize("name", [f"{kind}, {target}" for target in TPUS for kind in CASES])
def test_tpu(compiled, name):
    got = compiled["tpu"][name]
    assert got["spills"] == 0
    assert got["temporary"] < SMALL
    recorded = budgets().get(VERSION)
    if recorded is None:
        pytest.skip(
            f"no budgets for {VERSION}: python -m tests.kernels_pallas.decode_targets --record"
        )
    assert got["always"] <= GROWTH * recorded[name]["always"]
    assert len(got["bodies"]) == len(recorded[name]["bodies"])
    for bundles, budget in zip(got["bodies"], recorded[name]["bodies"], strict=True):
        assert bundles <= GROWTH * budget


@pytest.mark.smoke
@pytest.mark.parametrize("kind", CASES)
def test_h200(compiled, kind):
    got = compiled["gpu"][kind]
    assert got["spills"] == 0 and not got["serialized"]
    assert got["registers"] <= 255
    assert got["temporary"] < SMALL
