"""The benchmark's table: rates, errors, contenders that fail; and the shapes of every contest."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import Full, Window, benchmark, contests
from kernels_pallas.contests import CONTESTS, Contest, Shape, random_arrays, visible

SIZES = tuple(jax.ShapeDtypeStruct((64, 64), jnp.float32) for _ in range(2))


def broken(a, b):
    raise RuntimeError("not on this chip\nsecond line")


def contest(platform, dtype, backward=False):
    return Contest(
        "product",
        {"ours": jnp.matmul, "off by a hundredth": lambda a, b: 1.01 * (a @ b), "broken": broken},
        SIZES,
        SIZES,
        jnp.matmul,
        flops=2 * 64**3,
        backward=backward,
    )


@pytest.mark.parametrize("backward", [False, True])
def test_table(backward, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, "MATMUL", {"cpu": 64})
    monkeypatch.setitem(CONTESTS, "product", lambda *a: [contest(*a, backward=backward)])
    rows = benchmark.main(["--contests=product", "--rounds=3", f"--output={tmp_path}"])
    ours, off, failed = rows
    assert ours["error"] < 1e-6 and off["error"] == pytest.approx(0.01, rel=0.01)
    assert ours["rate"] == pytest.approx(2 * 64**3 / ours["seconds"] / 1e12)
    assert ours["of_yardstick"] > 0 and ours["of_datasheet"] is None
    assert failed["failed"] == "RuntimeError: not on this chip"
    written = json.loads((tmp_path / "benchmark.json").read_text())
    assert written["rows"] == rows and written["jax"] == jax.__version__
    assert (tmp_path / "benchmark.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "TFLOP/s" in printed and "of the yardstick" in printed and "not on this chip" in printed


def test_visible_pairs():
    assert visible(Shape(1, 64, 1, 8)) == 64**2 / 2
    assert visible(Shape(1, 64, 1, 8, mask=Full())) == 64**2
    shape = Shape(1, 64, 1, 8, mask=Window(9, 2))
    positions = np.arange(64)
    assert visible(shape) == shape.mask.allowed(positions[:, None], positions).sum()
    assert str(shape) == "window(left=9, right=2) 1x64x1x8" and str(Shape(2, 8, 4, 8, 1)) == (
        "causal 2x8x4/1x8"
    )


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
@pytest.mark.parametrize("kind", CONTESTS)
def test_accelerator_contests_have_matching_shapes(platform, kind):
    """Our kernel comes first; `exact` and our portable backend return the same shapes."""
    cases = CONTESTS[kind](platform, jnp.bfloat16)
    assert cases and (kind != "attention" or len(cases) == 2 * len(contests.SHAPES["accelerator"]))
    for contest in cases:
        assert next(iter(contest.contenders)) in ("tpu", "gpu", "cudnn", "xla", "xla_chunked")
        want = jax.eval_shape(contest.exact, *contest.small)
        got = jax.eval_shape(contest.contenders["xla"], *contest.small)
        assert jax.tree.map(lambda a: a.shape, got) == jax.tree.map(lambda a: a.shape, want)
        assert (contest.flops > 0) != (contest.bytes > 0)


def test_random_arrays():
    sizes = (*SIZES, jax.ShapeDtypeStruct((5,), jnp.int32))
    a, b, targets = random_arrays(sizes, {2: 7})
    assert np.std(a) == pytest.approx(1, rel=0.05) and np.std(b) == pytest.approx(1 / 8, rel=0.05)
    assert targets.dtype == jnp.int32 and ((targets >= 0) & (targets < 7)).all()


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--contests=speed", "'speed' is unknown; allowed: attention, decoding"),
        ("--target=v9", "'v9' is unknown; allowed: v4, v5e"),
        ("--rounds=0", "--rounds is 0; allowed: at least 1"),
    ],
)
def test_bad_flags(flag, message, capsys):
    with pytest.raises(SystemExit):
        benchmark.main([flag])
    assert message in capsys.readouterr().err
