"""Flash attention forward for Hopper: two warpgroups compute, a third one loads.

The loading warpgroup streams key blocks through a ring in shared memory. Each of the others owns
half of the queries, and a pair of barriers makes them alternate, as in FlashAttention-3 (Shah et
al. 2024, section 3.1): while one computes its softmax, the tensor core works for the other. When
its turn comes, a warpgroup starts two products together, weights of this visit by values and
queries by keys of the next visit, so that the tensor core has no gap between them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..padding import pad_length
from ..spec import Operands
from .place import Place, find_place
from .plan import COMPILER_PARAMS, CONSUMERS, REGISTERS, Blocks, Plan, matrix
from .tile import (
    LOG2_E,
    LOWEST,
    Ids,
    across,
    add_product,
    down,
    filled,
    hidden,
    load_columns,
    load_rows,
    logits,
    positions,
    product,
)


def forward(x: Operands, plan: Plan):
    """(out like x.q, lse float32 [batch, heads, q_length]).

    x [batch, length, heads, head_dim], head_dim a multiple of 32.
    """
    batch, q_length, heads, head_dim = x.q.shape
    blocks = plan.blocks
    arrays = dict(
        schedule=jnp.asarray(plan.schedule.table),
        q=pad_length(x.q, 1, blocks.rows),
        k=pad_length(x.k, 1, blocks.columns),
        v=pad_length(x.v, 1, blocks.columns),
    )
    for name in ("slopes", "sinks", "q_offset"):
        if getattr(x, name) is not None:
            arrays[name] = getattr(x, name)
    if x.q_segment_ids is not None:
        arrays["q_segments"] = pad_length(x.q_segment_ids.astype(jnp.int32), 1, blocks.rows)
        arrays["k_segments"] = pad_length(x.kv_segment_ids.astype(jnp.int32), 1, blocks.columns)
    padded = arrays["q"].shape[1]
    outputs = dict(
        out=jax.ShapeDtypeStruct((batch, padded, heads, head_dim), x.q.dtype),
        lse=jax.ShapeDtypeStruct((batch, heads, padded), jnp.float32),
    )
    buffers = scratch(x, blocks)
    names = (*arrays, *outputs, *buffers)

    def flash_attention_forward(*refs):
        _kernel(dict(zip(names, refs, strict=True)), plan)

    out, lse = plgpu.kernel(
        flash_attention_forward,
        out_type=list(outputs.values()),
        scratch_types=list(buffers.values()),
        # The last dimension varies fastest: the thread blocks of one head share its keys in the
        # cache.
        grid=(batch, heads, padded // blocks.rows),
        grid_names=("batch", "head", "line"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=COMPILER_PARAMS,
        interpret=plan.interpret,
    )(*arrays.values())
    return out[:, :q_length], lse[:, :, :q_length]


def scratch(x: Operands, blocks: Blocks) -> dict:
    """The buffers and barriers of a thread block, by name. x [batch, length, heads, head_dim]."""
    part, columns, stages = blocks.part, blocks.columns, blocks.stages
    head_dim, dtype = x.q.shape[3], x.q.dtype
    segments = x.q_segment_ids is not None
    loads = 2 if segments else 1
    buffers = dict(
        q_tile=matrix((CONSUMERS, part, head_dim), dtype),
        k_ring=matrix((stages, columns, head_dim), dtype),
        v_ring=matrix((stages, columns, head_dim), dtype),
        lse_part=plgpu.SMEM((CONSUMERS, part), jnp.float32),
        q_ready=plgpu.Barrier(num_arrivals=CONSUMERS * loads),
        k_ready=plgpu.Barrier(num_barriers=stages),
        v_ready=plgpu.Barrier(num_arrivals=loads, num_barriers=stages),
        k_free=plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
        v_free=plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
        turn=plgpu.Barrier(num_barriers=CONSUMERS),
    )
    if segments:
        buffers["q_segments_part"] = plgpu.SMEM((CONSUMERS, part), jnp.int32)
        buffers["k_segments_ring"] = plgpu.SMEM((stages, columns), jnp.int32)
    return buffers


def _kernel(refs: dict, plan: Plan):
    warpgroup = jax.lax.axis_index("warpgroup")
    pl.when(warpgroup < CONSUMERS)(lambda: _compute(refs, plan, warpgroup))
    pl.when(warpgroup == CONSUMERS)(lambda: _load(refs, plan))


def _load(refs: dict, plan: Plan):
    """The loading warpgroup: loads queries once, then keys and values as slots become free."""
    plgpu.set_max_registers(REGISTERS["loading"], action="decrease")
    place, blocks = find_place(refs, groups=1), plan.blocks
    kv_head = jax.lax.div(place.head, jnp.int32(plan.groups))
    for i in range(CONSUMERS):
        rows = pl.ds(place.block * blocks.rows + i * blocks.part, blocks.part)
        source = refs["q"].at[place.batch, rows, place.head]
        plgpu.copy_gmem_to_smem(source, refs["q_tile"].at[i], refs["q_ready"])
        if "q_segments" in refs:
            source = refs["q_segments"].at[place.batch, rows]
            plgpu.copy_gmem_to_smem(source, refs["q_segments_part"].at[i], refs["q_ready"])

    def step(visit, _):
        slot = jax.lax.rem(visit, jnp.int32(blocks.stages))
        keys = pl.ds(place.column_block(visit)[1] * blocks.columns, blocks.columns)
        for name in ("k", "v"):
            ready = refs[f"{name}_ready"].at[slot]
            plgpu.barrier_wait(refs[f"{name}_free"].at[slot])
            source = refs[name].at[place.batch, keys, kv_head]
            plgpu.copy_gmem_to_smem(source, refs[f"{name}_ring"].at[slot], ready)
            if name == "v" and "k_segments" in refs:
                source = refs["k_segments"].at[place.batch, keys]
                plgpu.copy_gmem_to_smem(source, refs["k_segments_ring"].at[slot], ready)

    jax.lax.fori_loop(jnp.int32(0), place.visits, step, None)


def _compute(refs: dict, plan: Plan, me):
    """A computing warpgroup: computes its part of the queries."""
    plgpu.set_max_registers(REGISTERS["computing"], action="increase")
    place, blocks = find_place(refs, groups=1), plan.blocks
    for slot in range(blocks.stages):  # all slots of a ring start free
        plgpu.barrier_arrive(refs["k_free"].at[slot])
        plgpu.barrier_arrive(refs["v_free"].at[slot])
    pl.when(me == 1)(lambda: plgpu.barrier_arrive(refs["turn"].at[0]))
    rows = _Rows(refs, plan, place, me)
    plgpu.barrier_wait(refs["q_ready"])
    state = rows.first()
    first, last = jnp.int32(0), place.visits - 1
    if plan.schedule.partial:
        step = lambda visit, state: rows.next(visit, state, compare=True)
        state = jax.lax.fori_loop(first, jnp.minimum(place.partial, last), step, state)
    if plan.schedule.full:
        step = lambda visit, state: rows.next(visit, state, compare=False)
        state = jax.lax.fori_loop(place.partial, last, step, state)
    rows.finish(last, state, compare=plan.schedule.partial)


class _State(NamedTuple):
    """The state of the softmax before a visit, and the raw scores of that visit."""

    sums: jax.Array  # [rows, head_dim]
    top: jax.Array  # [rows], like the next
    total: jax.Array
    scores: jax.Array  # [rows, columns]


class _Rows:
    """One warpgroup's part of the queries, and the steps of its softmax over the visits."""

    def __init__(self, refs: dict, plan: Plan, place: Place, me):
        self.refs, self.plan, self.place, self.me = refs, plan, place, me
        self.part, self.head_dim = refs["q_tile"].shape[1:]
        self.start = place.block * plan.blocks.rows + me * self.part
        self.q = refs["q_tile"].at[me]
        self.slope = refs["slopes"][place.head] * LOG2_E if "slopes" in refs else None

    def first(self) -> _State:
        """The state before visit 0."""
        refs = self.refs
        top, total = LOWEST, 0.0
        if "sinks" in refs:  # one more logit, before all others
            top = jnp.maximum(refs["sinks"][self.place.head] * LOG2_E, LOWEST)
            total = 1.0
        plgpu.barrier_wait(refs["k_ready"].at[0])
        scores, _ = product(self.q, self._keys(0))
        plgpu.barrier_arrive(refs["k_free"].at[0])
        sums = filled((self.part, self.head_dim), 0.0)
        return _State(sums, filled((self.part,), top), filled((self.part,), total), scores)

    def next(self, visit, state: _State, *, compare: bool) -> _State:
        """The state after `visit`, which must not be the last one."""
        refs, slot, ahead = self.refs, self._slot(visit), self._slot(visit + 1)
        sums, top, total, weights = self._softmax(visit, slot, state, compare)
        plgpu.barrier_wait(refs["k_ready"].at[ahead])
        plgpu.barrier_wait(refs["turn"].at[self.me])
        sums, scores = add_product(
            sums,
            weights,
            refs["v_ring"].at[slot],
            then=(self.q, self._keys(ahead)),
            started=lambda: plgpu.barrier_arrive(refs["turn"].at[1 - self.me]),
            interpret=self.plan.interpret,
        )
        plgpu.barrier_arrive(refs["v_free"].at[slot])
        plgpu.barrier_arrive(refs["k_free"].at[ahead])
        return _State(sums, top, total, scores)

    def finish(self, visit, state: _State, *, compare: bool):
        """The last visit; writes out and lse, 0 and -inf if no key was visible."""
        refs, slot = self.refs, self._slot(visit)
        sums, top, total, weights = self._softmax(visit, slot, state, compare)
        v = refs["v_ring"].at[slot]
        sums, _ = add_product(sums, weights, v, interpret=self.plan.interpret)
        empty = total == 0
        inverse = jnp.where(empty, 0.0, 1 / jnp.where(empty, 1.0, total))
        lse = top * (1 / LOG2_E) + jnp.log(total)
        lse = jnp.where(empty | (top <= LOWEST), -jnp.inf, lse)
        out_tile, lse_part = (
            self.q,
            refs["lse_part"].at[self.me],
        )  # the queries are no longer needed
        out_tile[...] = (sums * across(inverse, sums.shape)).astype(out_tile.dtype)
        lse_part[...] = lse
        plgpu.commit_smem()
        rows = pl.ds(self.start, self.part)
        place = self.place
        plgpu.copy_smem_to_gmem(out_tile, refs["out"].at[place.batch, rows, place.head])
        plgpu.copy_smem_to_gmem(lse_part, refs["lse"].at[place.batch, place.head, rows])
        plgpu.wait_smem_to_gmem(0)

    def _softmax(self, visit, slot, state: _State, compare: bool):
        """(sums, top, total, weights): the softmax including the scores of `visit`, whose weights
        are not yet in the sums. Waits for the values of the visit."""
        plan, refs = self.plan, self.refs
        plgpu.barrier_wait(refs["v_ready"].at[slot])  # and for the segment ids of the keys
        s = state.scores
        ids = None
        if compare or "slopes" in refs or "q_segments" in refs:
            ids = self._ids(visit, slot, s.shape)
        t, factor, _ = logits(s, ids, plan.spec, self.slope)
        kv_length = plan.kv_length if plan.k_padded else None
        t = hidden(t, ids, plan.spec, compare=compare, kv_length=kv_length)
        top = jnp.maximum(state.top, t.max(axis=1) * factor)
        weights = jnp.exp2(t * factor - across(top, t.shape))
        decay = jnp.exp2(state.top - top)
        total = state.total * decay + weights.sum(axis=1)
        sums = state.sums * across(decay, state.sums.shape)
        return sums, top, total, weights.astype(refs["v"].dtype)

    def _ids(self, visit, slot, shape) -> Ids:
        refs, plan, place = self.refs, self.plan, self.place
        offset = plan.spec.q_offset
        if offset is None:
            offset = refs["q_offset"][place.batch]
        q_ids = positions(shape, 0, self.start + offset)
        k_ids = positions(shape, 1, place.column_block(visit)[1] * plan.blocks.columns)
        if "q_segments" not in refs:
            return Ids(q_ids, k_ids)
        q_segments = load_rows(refs["q_segments_part"].at[self.me])
        k_segments = load_columns(refs["k_segments_ring"].at[slot])
        plgpu.commit_smem()  # the slot will be overwritten
        return Ids(q_ids, k_ids, across(q_segments, shape), down(k_segments, shape))

    def _keys(self, slot):
        return self.refs["k_ring"].at[slot].transpose((1, 0))

    def _slot(self, visit):
        return jax.lax.rem(visit, jnp.int32(self.plan.blocks.stages))
