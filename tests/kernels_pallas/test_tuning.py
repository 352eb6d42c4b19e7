"""The tuning table: lookups, updates, and the prediction of its rows."""

import pytest

from kernels_pallas import Causal, Chunked, Full, Prefix, Window, tune, tuning
from kernels_pallas.bundles import Bundles
from kernels_pallas.targets import TARGETS
from kernels_pallas.tpu import cycles
from kernels_pallas.tpu.visits import Blocks, visits

ROW = tuning.Row(
    kernel="k",
    device="d",
    dtype="bfloat16",
    head_dim=128,
    length=8192,
    mask="causal",
    q=1,
    k=2,
    sub_q=3,
    ahead=0,
    share=0.5,
    source="predicted",
)


@pytest.fixture
def table(monkeypatch, tmp_path):
    """Returns a function that writes rows as the table."""
    monkeypatch.setattr(tuning, "TABLE", tmp_path / "table.csv")

    def put(*rows):
        tuning.write(list(rows))
        tuning.table.cache_clear()
        tuning.lookup.cache_clear()

    yield put
    tuning.table.cache_clear()
    tuning.lookup.cache_clear()


def test_nearest_row(table):
    other_mask = ROW._replace(mask="full", head_dim=64)
    other_dim = ROW._replace(head_dim=256)
    other_dtype = ROW._replace(dtype="float32", length=2048)
    table(ROW, other_mask, other_dim, other_dtype)
    find = lambda *key: tuning.lookup("k", "d", *key)
    assert find("bfloat16", 128, 8192, "causal") == ROW
    assert find("bfloat16", 64, 8192, "causal") == ROW  # mask before head dim
    assert find("bfloat16", 250, 8192, "causal") == other_dim
    assert find("float32", 128, 8192, "causal") == other_dtype  # dtype before length
    assert find("bfloat16", 128, 2048, "causal") == ROW
    assert find("bfloat16", 128, 8192, "full") == other_mask
    assert tuning.lookup("k", "another", "bfloat16", 128, 8192, "causal") is None
    assert tuning.lookup("other", "d", "bfloat16", 128, 8192, "causal") is None


def test_table_round_trips(table):
    table(ROW, ROW._replace(share=0.25, length=1024))
    assert set(tuning.read()) == {ROW, ROW._replace(share=0.25, length=1024)}


def test_measured_rows_are_kept():
    measured = ROW._replace(source="measured", q=9)
    assert tune.merge((ROW,), [measured]) == [measured]
    assert tune.merge((measured,), [ROW]) == [measured]
    assert tune.merge((measured,), [measured._replace(q=8)]) == [measured._replace(q=8)]
    assert tune.merge((ROW,), [ROW._replace(length=1)]) == [ROW, ROW._replace(length=1)]


@pytest.mark.parametrize(
    "mask, kind",
    [
        (Full(), "full"),
        (Causal(), "causal"),
        (Prefix(7), "causal"),
        (Window(5), "local"),
        (Chunked(8) & Causal(), "local"),
    ],
)
def test_mask_kinds(mask, kind):
    assert tuning.mask_kind(mask) == kind


def test_checked_in_rows_are_valid():
    rows = [row for row in tuning.table() if row.device.startswith("TPU")]
    assert rows
    kinds = {target.device_kind for target in TARGETS.values()}
    for row in rows:
        assert row.device in kinds and row.mask in tuning.MASK_KINDS
        assert row.source in ("measured", "predicted")
        assert 0 < row.share < 1
        Blocks(row.q, row.k, row.sub_q, bool(row.ahead))
    assert len({row[:6] for row in rows}) == len(rows)


def test_cycles_of_a_call():
    """Two causal query blocks: one clear block and two on the diagonal."""
    blocks = Blocks(512, 512, 512)
    plan = visits(Causal(), blocks, 1024, 1024)
    times = {run.compare: times for (run,), times in zip(plan.patterns, (2, 1), strict=True)}
    assert times == {True: 2, False: 1}
    listing = Bundles(always=10, bodies=(1, 1000, 2000, 3), spills=0, total=0)
    known = cycles.costs("forward", listing, plan)
    slow_unit, fast_unit = 1.0, 1e12
    spent = cycles.cycles("forward", known, plan, blocks, 128, fast_unit)
    assert spent == 3 * 10 + 2 * (1 + 3) + 2 * 1000 + 2000
    least = cycles.cycles("forward", known, plan, blocks, 128, slow_unit)
    assert least >= 3 * 4 * 512 * 512 * 128  # no faster than the matrix unit
    assert cycles.useful_flops("forward", Causal(), 1024, 128) == 2 * 1024**2 * 128
    assert cycles.useful_flops("backward", Window(0), 8, 4) == 10 * 8 * 4
    with pytest.raises(ValueError, match="4 bodies in the listing of flash attention backward"):
        cycles.costs("backward", listing, plan)


@pytest.mark.parametrize(
    "device, least", [("TPU v5 lite", 0.79), ("TPU v5", 0.85), ("TPU v6 lite", 0.36)]
)
def test_predicted_share_of_the_peak(device, least):
    """bf16, head dim 128, causal, 8k tokens, at the clocks in `targets`."""
    row = tuning.lookup("flash_attention_forward", device, "bfloat16", 128, 8192, "causal")
    assert (row.device, row.head_dim, row.length, row.mask) == (device, 128, 8192, "causal")
    assert row.share >= least
