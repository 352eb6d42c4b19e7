"""Predicted cycles of a flash attention call, from the bundles of the compiled kernel.

A bundle is assumed to take one cycle: counted that way, published times of other kernels correspond
to 1.72 to 1.89 Gbundle/s on chips with a 1.75 GHz clock. No body is assumed to be faster than its
matmuls at the chip's peak. Where data arrives late, the actual time is longer.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..bundles import Bundles
from ..masks import Causal, Mask
from ..targets import Target
from .visits import FIRST, LAST, PATTERN_SHIFT, Blocks, Pattern, Visits

MATMULS = {"forward": 2, "backward": 5}  # each 2 * queries * keys * head_dim FLOPs


class Costs(NamedTuple):
    """Bundles of a kernel, by purpose."""

    step: int  # every grid step: moving the blocks
    begin: int  # the first visit of a query block
    end: int  # its last visit
    key_block: int  # once per key block: its gradients are zeroed and written
    patterns: dict[Pattern, int]


def costs(which: str, bundles: Bundles, visits: Visits) -> Costs:
    """`bundles` of the kernel `which` ("forward", "backward"; without slopes), compiled with
    `visits`. ValueError if the number of bodies does not match that kernel."""
    count = len(visits.patterns)
    ends = 1 if which == "forward" else 2
    bodies = bundles.bodies
    if len(bodies) != count + 2 * ends:
        raise ValueError(
            f"{len(bodies)} bodies in the listing of flash attention {which}; "
            f"expected {count + 2 * ends}"
        )
    return Costs(
        step=bundles.always,
        begin=bodies[ends - 1],
        end=bodies[ends + count],
        key_block=0 if ends == 1 else bodies[0] + bodies[-1],
        patterns=dict(zip(visits.patterns, bodies[ends : ends + count], strict=True)),
    )


def cycles(which: str, costs: Costs, visits: Visits, blocks: Blocks, head_dim: int, peak) -> float:
    """Cycles of one query head on one core; `peak` in FLOPs per cycle and core.

    KeyError for a pattern that was not compiled.
    """
    times = np.bincount(visits.flags >> PATTERN_SHIFT, minlength=len(visits.patterns))
    total = len(visits.flags) * costs.step
    total += costs.begin * np.count_nonzero(visits.flags & FIRST)
    total += costs.end * np.count_nonzero(visits.flags & LAST)
    total += costs.key_block * (int(visits.k_block.max()) + 1)
    for count, pattern in zip(times, visits.patterns, strict=True):
        keys = sum(run.stop - run.start for run in pattern)
        flops = MATMULS[which] * 2 * blocks.sub_q * keys * head_dim
        total += count * max(costs.patterns[pattern], flops / peak)
    return float(total)


def useful_flops(which: str, mask: Mask, length: int, head_dim: int) -> float:
    """FLOPs of one head at q_length = kv_length = length, counting only visible pairs; a causal
    mask
    counts as half of all pairs."""
    if mask == Causal():
        pairs = length**2 / 2
    else:
        ends = (mask.key_range(i, i + 1, length) for i in range(length))
        pairs = sum(stop - start for start, stop in ends)
    return MATMULS[which] * 2.0 * pairs * head_dim


def share(
    which: str, costs: Costs, visits: Visits, blocks: Blocks, head_dim: int, useful: float, target
) -> float:
    """The predicted share of the peak of `target`, at its nominal clock, for one head with the
    given
    `useful_flops`."""
    peak = peak_per_cycle(target)
    return useful / peak / cycles(which, costs, visits, blocks, head_dim, peak)


def peak_per_cycle(target: Target) -> float:
    """bf16 FLOPs per cycle of one core."""
    return target.bf16_flops / target.clock_hz / target.cores
