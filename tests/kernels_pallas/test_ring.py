"""Ring attention: equality with attention, gradients of its pieces, zigzag order, errors."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from kernels_pallas import Causal, Chunked, Full, Prefix, Window, ring_attention, unzigzag, zigzag
from kernels_pallas.masks import Shifted
from kernels_pallas.piece_gradients import gradients
from kernels_pallas.reference import attention
from kernels_pallas.ring import Ring, _pair
from kernels_pallas.scores import sink_gradient
from kernels_pallas.validate import prepare
from tests.commands import environment
from tests.conftest import ROOT

from .cases import FAST, close, make

pytestmark = pytest.mark.depends_on("interpreted TPU kernels")


def test_eight_devices_match_one():
    result = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "kernels_pallas" / "ring_devices.py")],
        env=environment(devices=8), cwd=ROOT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert len(report) == 4
    for name, facts in report.items():
        assert facts["values"] < 2e-6 and facts["gradients"] < 2e-5, (name, facts)


def test_gradients_of_pieces_add_up(monkeypatch):
    """Keys in two pieces, each with the log-sum-exp of both, against autodiff of the reference."""
    monkeypatch.setattr("kernels_pallas.piece_gradients.KEYS", 16)
    arrays, static = make(
        mask=Window(30, 2), kv_heads=2, alibi=True, sinks=True, segments=True, logits_soft_cap=3.0
    )
    x, spec = (
        jax.tree.map(jnp.asarray, prepare(**arrays, **static)[0]),
        prepare(**arrays, **static)[1],
    )
    learned = x._replace(q_segment_ids=None, kv_segment_ids=None)
    ids = dict(q_segment_ids=x.q_segment_ids, kv_segment_ids=x.kv_segment_ids)

    def run(learned):
        return attention(learned._replace(**ids), spec)

    def both(learned):
        (out, lse), pull = jax.vjp(run, learned)
        dout = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
        dlse = jnp.sin(jnp.arange(lse.size, dtype=lse.dtype)).reshape(lse.shape)
        dlse = jnp.where(lse == -jnp.inf, 0, dlse)
        (want,) = pull((dout, dlse))
        delta = jnp.swapaxes((out * dout).sum(-1), 1, 2) - dlse
        cut = 23
        first = x._replace(k=x.k[:, :cut], v=x.v[:, :cut], kv_segment_ids=x.kv_segment_ids[:, :cut])
        rest = x._replace(k=x.k[:, cut:], v=x.v[:, cut:], kv_segment_ids=x.kv_segment_ids[:, cut:])
        shifted = spec.__class__(
            spec.mask.shifted(cut), spec.scale, spec.logits_soft_cap, spec.q_offset - cut
        )
        a, b = gradients(first, spec, dout, lse, delta), gradients(rest, shifted, dout, lse, delta)
        got = dict(q=a.q + b.q, slopes=a.slopes + b.slopes)
        got |= dict(k=jnp.concatenate([a.k, b.k], 1), v=jnp.concatenate([a.v, b.v], 1))
        return got, {name: getattr(want, name) for name in got}

    got, want = jax.jit(both, compiler_options=FAST)(learned)
    assert all(np.abs(a).max() > 0.01 for a in jax.tree.leaves(want))
    close(got, want, 2e-5)


def test_sinks_without_weight_have_no_gradient():
    lse = jnp.array([[[-np.inf, 2.0], [0.5, 1.0]]])  # the first query sees no key
    got = sink_gradient(jnp.array([-np.inf, 0.5]), lse, jnp.array([[[0.0, 3.0], [2.0, 4.0]]]))
    close(got, np.array([0, -2 - 4 * np.exp(-0.5)]), 1e-6)


MASKS = (Full(), Causal(), Window(5, 2), Prefix(9), Chunked(6), Prefix(7) & Chunked(8))


@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_a_shifted_mask_is_the_mask_at_later_positions(mask):
    q, k = np.arange(24)[:, None], np.arange(24)
    whole = mask.allowed(q, k)
    for by in (0, 4, 6, 13):
        shifted = mask.shifted(by)
        there = shifted.allowed(q[: 24 - by], k[: 24 - by])
        assert (there == whole[by:, by:]).all()
        assert shifted.shifted(2) == mask.shifted(by + 2)
        for start in range(0, 24 - by, 4):
            rows = whole[by + start : by + start + 4, by:]
            first, last = shifted.key_range(start, start + 4, 24 - by)
            assert not rows[:, :first].any() and not rows[:, last:].any()
            kind = shifted.block_kind(start, start + 4, 0, 4)
            want = {"full": True, "skipped": False}
            if kind in want:
                assert (rows[:, :4] == want[kind]).all()


def test_only_masks_that_cannot_be_shifted_are_wrapped():
    assert [m.shifted(6) for m in MASKS[:3]] == list(MASKS[:3])
    assert Prefix(9).shifted(6) == Prefix(3) and Chunked(6).shifted(12) == Chunked(6)
    assert Chunked(6).shifted(7) == Shifted(Chunked(6), 1)


def test_zigzag_balances_a_causal_mask():
    """Visible pairs of pieces per device: 17 each in zigzag order, 1 to 8 in contiguous order."""
    _, spec = prepare(*[np.zeros((1, 4, 1, 8), np.float32)] * 3)
    x = prepare(*[np.zeros((1, 4, 1, 8), np.float32)] * 3)[0]
    for order, most in (("contiguous", 8), ("zigzag", 17)):
        ring = Ring("ring", 8, order, spec, "xla")
        every = range(ring.pieces)
        seen = [
            sum(
                _pair(ring, d, (d - step) % 8, i, j, 4, x) is not None
                for step in range(8)
                for i in every
                for j in every
            )
            for d in range(8)
        ]
        assert max(seen) == most
        assert min(seen) == (17 if order == "zigzag" else 1)


def test_unzigzag_undoes_zigzag():
    assert zigzag(np.arange(8)[None], 2).tolist() == [[0, 1, 6, 7, 2, 3, 4, 5]]
    x = np.random.default_rng(0).standard_normal((2, 3, 12), np.float32)
    close(unzigzag(zigzag(x, 3, axis=2), 3, axis=2), x, 0)
    with pytest.raises(ValueError, match=r"length 10 on 4 devices in zigzag order; allowed: mult"):
        zigzag(np.zeros((1, 10)), 4)


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(order="striped"), r"order is 'striped'; allowed: contiguous, zigzag"),
        (dict(k=jnp.zeros((1, 6, 2, 8))), r"k has shape"),
        (dict(q=jnp.zeros((1, 6, 2, 8))), r"q_length 6 and kv_length 5 per device; must be equal"),
        (dict(order="zigzag"), r"length 5 per device in zigzag order; allowed: even lengths"),
        (dict(bias=jnp.zeros((5, 5))), r"bias is an array; allowed in ring attention: None or Al"),
        (dict(axis_name="rings"), r"axis_name is 'rings'; allowed: a manual axis of an enclosing"),
        (dict(backend="tpu"), r"backend 'tpu' is not available on cpu"),
    ],
)
def test_errors_name_the_value_and_what_is_allowed(change, match):
    array = jnp.zeros((1, 5, 2, 8))
    call = dict(q=array, k=array, v=array, axis_name="ring") | change
    mesh = jax.make_mesh((1,), ("ring",), axis_types=(AxisType.Auto,))
    run = jax.shard_map(
        lambda q, k, v: ring_attention(
            q, k, v, **{n: a for n, a in call.items() if n not in "qkv"}
        ),
        mesh=mesh,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    with pytest.raises(ValueError, match=match) as error:
        run(call["q"], call["k"], call["v"])
    assert "\n" not in str(error.value)


def test_a_ring_of_one_device_is_attention():
    arrays, static = make(kv_heads=2, q_length=61)
    mesh = jax.make_mesh((1,), ("ring",), axis_types=(AxisType.Auto,))
    run = jax.shard_map(
        lambda q, k, v: ring_attention(q, k, v, axis_name="ring", return_lse=True),
        mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False,
    )  # fmt: skip
    x, spec = prepare(**arrays, **static)
    close(
        jax.jit(run)(*map(jnp.asarray, x[:3])), attention(jax.tree.map(jnp.asarray, x), spec), 2e-6
    )
