"""Ring attention, compiled for four TPUs, sends while it computes."""

import pytest

from .target_process import need, report_of

pytestmark = pytest.mark.depends_on("kernels")


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_pieces_travel_while_others_are_attended_to(order):
    need("libtpu")
    events = report_of("ring_targets", order)
    names = [name for name, *_ in events]
    computing = [kind in ("custom-call", "conditional") for _, kind, _ in events]
    travels = [(names.index(source), at) for at, (_, kind, source) in enumerate(events)
               if kind == "collective-permute-done"]  # fmt: skip
    assert len(travels) == 6  # of keys and of values, three times
    assert all(any(computing[start:stop]) for start, stop in travels), events
