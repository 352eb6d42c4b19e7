"""Which blocks the Hopper kernels visit."""

import numpy as np
import pytest

from kernels_pallas import Causal, Chunked, Full, Prefix, Window
from kernels_pallas.gpu.schedule import schedule

MASKS = [
    Full(),
    Causal(),
    Window(40),
    Window(10, 300),
    Prefix(70),
    Chunked(100) & Causal(),
    Window(90, 20) & Prefix(130),
]


def visited(table, columns):
    """[row blocks, columns]: 0 skipped, 1 partial, 2 full, according to the table."""
    seen = np.zeros((len(table), columns), int)
    for block, start, full_start, full_stop, stop in table:
        seen[block, start:stop] = 1
        seen[block, full_start:full_stop] = 2
    return seen


@pytest.mark.parametrize("rows_are_keys", [False, True])
@pytest.mark.parametrize("q_offset", [0, 37, -50])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_block_kinds_match_the_mask(mask, q_offset, rows_are_keys):
    q_length, kv_length, rows, columns = 500, 610, 128, 64
    lengths = (kv_length, q_length) if rows_are_keys else (q_length, kv_length)
    plan = schedule(mask, rows, columns, q_length, kv_length, q_offset, rows_are_keys)
    counts = [-(-n // size) for n, size in zip(lengths, (rows, columns), strict=True)]
    seen = visited(plan.table, counts[1])
    q_ids, k_ids = np.arange(q_length)[:, None] + q_offset, np.arange(kv_length)
    allowed = np.broadcast_to(mask.allowed(q_ids, k_ids), (q_length, kv_length))
    allowed = allowed.T if rows_are_keys else allowed
    assert sorted(plan.table[:, 0]) == list(range(counts[0]))
    assert (plan.table[:, 4] > plan.table[:, 1]).all()
    assert plan.full == (seen == 2).any() and plan.partial == (seen == 1).any()
    for i, j in np.ndindex(*counts):
        block = allowed[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        assert seen[i, j] > 0 or not block.any()
        assert seen[i, j] < 2 or block.all()


def test_padding_keys_are_hidden():
    *_, full_stop, stop = schedule(Full(), 128, 64, 128, 130, 0).table[0]
    assert (full_stop, stop) == (2, 3)


def test_a_run_time_offset_compares_every_block():
    plan = schedule(Causal(), 128, 64, 256, 256, None)
    assert plan.partial and not plan.full and plan.visits == 8


def test_long_lines_come_first():
    table = schedule(Causal(), 128, 128, 4096, 4096, 0).table
    assert (np.diff(table[:, 4] - table[:, 1]) <= 0).all()


def test_a_window_visits_few_blocks():
    length = 32768
    for rows_are_keys in (False, True):
        window = schedule(Window(4096), 128, 128, length, length, 0, rows_are_keys)
        whole = schedule(Full(), 128, 128, length, length, 0, rows_are_keys)
        assert window.visits <= 0.14 * whole.visits
