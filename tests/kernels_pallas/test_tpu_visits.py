"""Which blocks the TPU kernels visit: everything visible, little more, each once."""

import numpy as np
import pytest

from kernels_pallas import Causal, Chunked, Full, Prefix, Window
from kernels_pallas.tpu.visits import FIRST, LAST, MAX_PATTERNS, PATTERN_SHIFT, Blocks, visits

MASKS = [
    Full(),
    Causal(),
    Window(300),
    Window(90, 200),
    Prefix(400),
    Chunked(256) & Causal(),
    Window(300) & Prefix(70),
]
BLOCKS = Blocks(256, 512, 64)


def coverage(plan, blocks, q_length, kv_length, k_start):
    """(how often each pair is computed, how often without a comparison)."""
    times = np.zeros((2, q_length + blocks.q, kv_length + blocks.k), int)
    for i, j, flag in zip(plan.q_block, plan.k_block, plan.flags, strict=True):
        for r, run in enumerate(plan.patterns[flag >> PATTERN_SHIFT]):
            q = i * blocks.q + r * blocks.sub_q
            k = k_start + j * blocks.k
            for piece in run.pieces:
                part = times[:, q : q + blocks.sub_q, k + piece.start : k + piece.stop]
                part[0] += 1
                part[1] += not piece.compare
    return times


@pytest.mark.parametrize("q_offset", [0, 37, -200, 700, None])
@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_every_visible_pair_is_computed_once(mask, q_offset):
    q_length, kv_length = 700, 1100
    for k_start, k_stop in ((0, kv_length), (512, 1024)):
        plan = visits(mask, BLOCKS, q_length, kv_length, q_offset, k_start, k_stop)
        times, clear = coverage(plan, BLOCKS, q_length, kv_length, k_start)
        q, k = np.arange(q_length)[:, None] + (q_offset or 0), np.arange(kv_length)
        visible = np.broadcast_to(mask.allowed(q, k), (q_length, kv_length)).copy()
        visible[:, :k_start] = visible[:, k_stop:] = False
        assert (times <= 1).all()
        assert times[:q_length, :kv_length][visible].all()
        # Pairs that are not compared are visible and not padding.
        assert not clear[:, k_stop:].any()
        if q_offset is not None:
            assert visible[clear[:q_length, :kv_length] == 1].all()


@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_order_of_visits(mask):
    plan = visits(mask, BLOCKS, 700, 1100)
    assert len(plan.patterns) <= MAX_PATTERNS
    for i in range(3):
        (at,) = np.nonzero(plan.q_block == i)
        assert len(at) and (np.diff(at) == 1).all()
        assert (plan.flags[at] & FIRST != 0).tolist() == [True] + [False] * (len(at) - 1)
        assert (plan.flags[at] & LAST != 0).tolist() == [False] * (len(at) - 1) + [True]


@pytest.mark.parametrize("blocks", [Blocks(512, 512, 256), Blocks(512, 1024, 256)])
def test_a_window_visits_few_blocks(blocks):
    window, full = (visits(mask, blocks, 32768, 32768) for mask in (Window(4095), Full()))
    assert window.runs <= 0.14 * full.runs
    if blocks.k == 512:
        assert len(window.flags) <= 0.14 * len(full.flags)


def test_causal_computes_little_more_than_half():
    causal, full = (visits(m, Blocks(512, 1024, 256), 8192, 8192) for m in (Causal(), Full()))
    assert causal.runs <= 0.53 * full.runs
