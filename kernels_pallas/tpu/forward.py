"""Flash attention forward (Dao 2023, algorithm 1): running maximum and sum, one pass over the keys.

Each run of queries keeps its maximum in every lane of a [rows, 128] tile, and its sum as 128
per-lane sums that are added up at the end, so the only reduction across lanes is one maximum per
tile.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..padding import pad_length
from ..spec import Operands
from . import layout
from .layout import Here, Plan
from .tile import (
    LOG2_E,
    LOWEST,
    Ids,
    across,
    as_columns,
    as_rows,
    capped,
    distance,
    hidden,
    lane_sums,
    matmul,
    positions,
)
from .visits import FIRST, LANES, LAST, PATTERN_SHIFT, Pattern, Run


def forward(x: Operands, plan: Plan):
    """(out like x.q, lse float32 [batch, heads, q_length]); x heads-major, see `layout`."""
    batch, heads, q_length, head_dim = x.q.shape
    blocks = plan.blocks
    q = pad_length(x.q, 2, blocks.q)
    k, v = (pad_length(a, 2, blocks.k) for a in (x.k, x.v))
    scalars, segments = layout.scalars(x, plan), layout.segment_arrays(x, plan)
    query = layout.query_spec((blocks.q, head_dim), plan)
    key = layout.key_spec((blocks.k, head_dim), plan)
    specs = dict(q=query, k=key, v=key) | (layout.segment_specs(plan) if segments else {})
    scratch = dict(
        top=pltpu.VMEM((blocks.q, LANES), jnp.float32),
        total=pltpu.VMEM((blocks.q, LANES), jnp.float32),
        sums=pltpu.VMEM((blocks.q, head_dim), jnp.float32),
    )
    if segments:
        scratch["q_columns"] = pltpu.VMEM((blocks.q, LANES), jnp.int32)
    names = (*scalars, *specs, "out", "lse", *scratch)
    grid = (batch, heads // plan.groups, plan.groups, len(plan.visits.flags))
    out, lse = pl.pallas_call(
        lambda *refs: _step(dict(zip(names, refs, strict=True)), plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=grid,
            in_specs=list(specs.values()),
            out_specs=[query, layout.query_spec((1, blocks.q), plan, row=True)],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, q.shape[2]), jnp.float32),
        ],
        compiler_params=layout.compiler_params(plan, sequential_groups=False),
        cost_estimate=layout.cost(x, plan, matmuls=2),
        interpret=plan.interpret,
        name="flash_attention_forward",
    )(*scalars.values(), q, k, v, *segments.values())
    return out[:, :, :q_length], lse[:, :, 0, :q_length]


def _step(refs: dict, plan: Plan):
    """One grid step: one key block for one query block."""
    at = layout.here(plan)
    flag = refs["flags"][at.visit]
    pl.when(flag & FIRST != 0)(lambda: _begin(refs, at))
    for index, pattern in enumerate(plan.visits.patterns):
        body = functools.partial(_visit, refs, plan, at, pattern)
        pl.when(flag >> PATTERN_SHIFT == index)(body)
    pl.when(flag & LAST != 0)(lambda: _end(refs))


def _visit(refs: dict, plan: Plan, at: Here, pattern: Pattern):
    """The runs of a block. The scores of the next run may be started before the softmax of this
    one,
    so that the matrix unit works in the meantime."""
    runs = [(r * plan.blocks.sub_q, run) for r, run in enumerate(pattern) if run.start < run.stop]
    ahead = plan.blocks.ahead or any(run.compare for run in pattern)
    scores = {}
    for i, (first, run) in enumerate(runs):
        for j, wanted in enumerate(runs[: i + 1 + ahead]):
            if j not in scores:
                scores[j] = _scores(refs, plan, *wanted)
        _accumulate(refs, plan, at, first, run, scores[i])


def _begin(refs: dict, at: Here):
    """Empty sums; a sink is the first logit, with its weight of 1 spread over the lanes."""
    top, total = LOWEST, 0.0
    if "sinks" in refs:
        top = jnp.maximum(refs["sinks"][at.head] * LOG2_E, LOWEST)
        total = 1 / LANES
    refs["top"][...] = jnp.full_like(refs["top"], top)
    refs["total"][...] = jnp.full_like(refs["total"], total)
    refs["sums"][...] = jnp.zeros_like(refs["sums"])
    if "q_columns" in refs:
        refs["q_columns"][...] = as_columns(refs["q_segments"][0])


def _scores(refs: dict, plan: Plan, first: int, run: Run):
    """Raw scores [sub_q, keys of the run], float32."""
    rows, keys = pl.ds(first, plan.blocks.sub_q), pl.ds(run.start, run.stop - run.start)
    return matmul(refs["q"][0, 0, rows], refs["k"][0, 0, keys], (1, 1))


def _accumulate(refs: dict, plan: Plan, at: Here, first: int, run: Run, s):
    """Adds the keys of `run` to the sums of the queries from `first` on."""
    rows, keys = pl.ds(first, plan.blocks.sub_q), pl.ds(run.start, run.stop - run.start)
    s, _ = capped(s, plan.spec)
    ids = _ids(refs, plan, at, s.shape, first, run)
    if "slopes" in refs:
        s = s - distance(ids) * (refs["slopes"][at.head] * LOG2_E)
    s = hidden(s, ids, run, plan.spec, key_axis=1, kv_length=plan.padded)
    before = refs["top"][rows]
    top = jnp.maximum(before, s.max(axis=1, keepdims=True))
    weights = jnp.exp2(s - across(top, s.shape[1]))
    decay = jnp.exp2(before - top)
    refs["top"][rows] = top
    refs["total"][rows] = decay * refs["total"][rows] + lane_sums(weights)
    v = refs["v"][0, 0, keys]
    added = matmul(weights.astype(v.dtype), v, (1, 0))
    refs["sums"][rows] = across(decay, v.shape[1]) * refs["sums"][rows] + added


def _ids(refs: dict, plan: Plan, at: Here, shape, first: int, run: Run) -> Ids:
    start = plan.k_start + refs["k_block"][at.visit] * plan.blocks.k + run.start
    q_ids = positions(shape, 0, layout.q_start(refs, plan, at) + first)
    k_ids = positions(shape, 1, start)
    if "q_columns" not in refs:
        return Ids(q_ids, k_ids)
    columns = refs["q_columns"][pl.ds(first, shape[0])]
    row = refs["k_segments"][0, :, pl.ds(run.start, shape[1])]
    return Ids(q_ids, k_ids, across(columns, shape[1]), row)


def _end(refs: dict):
    """Writes out and lse; 0 and -inf where no key was visible."""
    total = jnp.sum(refs["total"][...], axis=1, keepdims=True)
    # Without keys the sums are already 0.
    inverse = 1 / jnp.where(total == 0, 1.0, total)
    refs["out"][0, 0] = (refs["sums"][...] * inverse).astype(refs["out"].dtype)
    top, total = as_rows(refs["top"][...], total)
    lse = jnp.where(total == 0, -jnp.inf, (top + jnp.log2(total)) / LOG2_E)
    refs["lse"][0, 0] = jnp.where(top <= LOWEST, -jnp.inf, lse)
