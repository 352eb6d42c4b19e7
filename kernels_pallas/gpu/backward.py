"""Flash attention backward for Hopper (Dao 2023, algorithm 2), without atomics.

One kernel in several roles, each a separate call, so that every gradient is summed in a fixed order
by one warpgroup. In every role a thread block owns a block of rows (queries, or keys) and streams
blocks of columns (the others) past it; scores are [rows, columns], so they are transposed if the
rows are keys. With P the softmax, dP = dO V^T and dS = P (dP - delta), the gradients are dQ = dS K,
dK = dS^T Q and dV = P^T dO: always a tile of P or dS, in registers, by a block of columns.

Products start as early as possible: each visit starts the scores of the next one.
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
    Ids,
    across,
    add_product,
    distance,
    down,
    filled,
    hidden,
    load_columns,
    load_rows,
    logits,
    opaque,
    positions,
    product,
)


class Role(NamedTuple):
    """Which gradients a call computes: through the scores (of queries or keys), and of values."""

    rows_are_keys: bool
    scores: bool  # dQ, or dK if rows are keys
    values: bool  # dV

    @property
    def name(self) -> str:
        """The last part of the kernel's name."""
        if not self.rows_are_keys:
            return "queries"
        return "_and_".join(["keys"] * self.scores + ["values"] * self.values)

    @property
    def side(self) -> str:
        """The side whose gradients these are."""
        return "keys" if self.rows_are_keys else "queries"


QUERIES = Role(rows_are_keys=False, scores=True, values=False)
KEYS_AND_VALUES = Role(rows_are_keys=True, scores=True, values=True)
KEYS = Role(rows_are_keys=True, scores=True, values=False)
VALUES = Role(rows_are_keys=True, scores=False, values=True)

# (operand of the scores, operand of dP), and the arrays with one number per position.
QUERY_SIDE = ("q", "dout"), ("lse", "delta", "q_segments")
KEY_SIDE = ("k", "v"), ("k_segments",)


def backward(x: Operands, dout, lse, delta, role: Role, plan: Plan) -> dict:
    """{"q", "k", "v": gradient like that array, "slopes": [batch, heads]}, the role's entries only.

    x [batch, length, heads, head_dim], head_dim a multiple of 32; dout like x.q; lse and delta
    float32 [batch, heads, q_length], delta being sum(out * dout) minus the gradient of lse.
    """
    batch, q_length, heads, _ = x.q.shape
    kv_length, kv_heads = x.k.shape[1:3]
    arrays = _arrays(x, dout, lse, delta, role, plan)
    outputs = _outputs(arrays, role)
    buffers = scratch(x, role, plan.blocks)
    names = (*arrays, *outputs, *buffers)
    grid_heads, padded = (kv_heads, arrays["k"]) if role.rows_are_keys else (heads, arrays["q"])

    def kernel(*refs):
        _kernel(dict(zip(names, refs, strict=True)), role, plan)

    kernel.__name__ = f"flash_attention_backward_{role.name}"
    results = plgpu.kernel(
        kernel,
        out_type=list(outputs.values()),
        scratch_types=list(buffers.values()),
        grid=(batch, grid_heads, padded.shape[1] // plan.blocks.rows),
        grid_names=("batch", "head", "line"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=COMPILER_PARAMS,
        interpret=plan.interpret,
    )(*arrays.values())
    grads = {name[1:]: a for name, a in zip(outputs, results, strict=True)}
    if "slopes" in grads:
        grads["slopes"] = grads["slopes"].sum(2)
    lengths = dict(q=q_length, k=kv_length, v=kv_length)
    return {name: a[:, : lengths[name]] if name in lengths else a for name, a in grads.items()}


def _arrays(x: Operands, dout, lse, delta, role: Role, plan: Plan) -> dict:
    """The arrays that the kernel reads, by name, padded to whole blocks."""
    q_block, k_block = plan.blocks.rows, plan.blocks.columns
    if role.rows_are_keys:
        q_block, k_block = k_block, q_block
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse) * LOG2_E  # weight 0 where no key was visible
    arrays = dict(
        schedule=jnp.asarray(plan.schedule.table),
        q=pad_length(x.q, 1, q_block),
        dout=pad_length(dout, 1, q_block),
        k=pad_length(x.k, 1, k_block),
        v=pad_length(x.v, 1, k_block),
        lse=pad_length(lse, 2, q_block, jnp.inf),
        delta=pad_length(delta, 2, q_block),
    )
    if not role.scores:
        del arrays["v"], arrays["delta"]
    for name in ("slopes", "q_offset"):
        if getattr(x, name) is not None:
            arrays[name] = getattr(x, name)
    if x.q_segment_ids is not None:
        arrays["q_segments"] = pad_length(x.q_segment_ids.astype(jnp.int32), 1, q_block)
        arrays["k_segments"] = pad_length(x.kv_segment_ids.astype(jnp.int32), 1, k_block)
    return arrays


def _outputs(arrays: dict, role: Role) -> dict:
    like = lambda name: jax.ShapeDtypeStruct(arrays[name].shape, arrays[name].dtype)
    if not role.rows_are_keys:
        more = dict(dslopes=like("lse")) if "slopes" in arrays else {}
        return dict(dq=like("q")) | more
    return (dict(dk=like("k")) if role.scores else {}) | (dict(dv=like("k")) if role.values else {})


def _sides(role: Role):
    """(rows' matrices, rows' vectors), (columns' matrices, columns' vectors)."""
    return (KEY_SIDE, QUERY_SIDE) if role.rows_are_keys else (QUERY_SIDE, KEY_SIDE)


class _Vector(NamedTuple):
    """The place in shared memory of an array with one number per position. These arrays share two
    buffers, because each buffer is rounded up to 1024 bytes."""

    buffer: str
    start: int
    length: int
    count: int  # slots: one per consumer, or one per stage

    def ref(self, refs: dict, slot):
        return refs[self.buffer].at[pl.ds(self.start + slot * self.length, self.length)]


def _vectors(present, role: Role, blocks: Blocks) -> tuple[dict, dict]:
    """({name: _Vector} of the rows, the same of the columns), for the names in `present`."""
    ends = dict(floats=0, integers=0)

    def placed(names, length, count):
        vectors = {}
        for name in names:
            buffer = "integers" if name.endswith("_segments") else "floats"
            vectors[name] = _Vector(buffer, ends[buffer], length, count)
            ends[buffer] += length * count
        return vectors

    (_, rows), (_, columns) = _sides(role)
    chosen = lambda names: [name for name in names if name in present]
    return (
        placed(chosen(rows), blocks.part, CONSUMERS),
        placed(chosen(columns), blocks.columns, blocks.stages),
    )


def scratch(x: Operands, role: Role, blocks: Blocks) -> dict:
    """The buffers and barriers of a thread block, by name. x [batch, length, heads, head_dim]."""
    columns, stages = blocks.columns, blocks.stages
    (own, _), (others, _) = _sides(role)
    own = own if role.scores else own[:1]
    head_dim, dtype = x.q.shape[3], x.q.dtype
    present = {"lse"} | ({"delta"} if role.scores else set())
    if x.q_segment_ids is not None:
        present |= {"q_segments", "k_segments"}
    of_rows, of_columns = _vectors(present, role, blocks)
    buffers = {}
    for name in own:
        buffers[f"{name}_rows"] = matrix((CONSUMERS, blocks.part, head_dim), dtype)
    buffers["rows_ready"] = plgpu.Barrier(num_arrivals=CONSUMERS * (len(own) + len(of_rows)))
    # Blocks of the second matrix are in use for less than a visit.
    for name, size in zip(others, (stages, max(stages - 1, 1)), strict=True):
        buffers[f"{name}_ring"] = matrix((size, columns, head_dim), dtype)
        buffers[f"{name}_ready"] = plgpu.Barrier(num_barriers=size)
        buffers[f"{name}_free"] = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=size)
    if of_columns:
        arrivals = len(of_columns)
        buffers["vectors_ready"] = plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages)
        buffers["vectors_free"] = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages)
    for buffer, kind in (("floats", jnp.float32), ("integers", jnp.int32)):
        vectors = [v for v in (of_rows | of_columns).values() if v.buffer == buffer]
        if vectors:
            buffers[buffer] = plgpu.SMEM((sum(v.length * v.count for v in vectors),), kind)
    return buffers


def _kernel(refs: dict, role: Role, plan: Plan):
    warpgroup = jax.lax.axis_index("warpgroup")
    place = find_place(refs, plan.groups if role.rows_are_keys else 1)
    pl.when(warpgroup < CONSUMERS)(lambda: _compute(refs, role, plan, place, warpgroup))
    pl.when(warpgroup == CONSUMERS)(lambda: _load(refs, role, plan, place))


def _load(refs: dict, role: Role, plan: Plan, place: Place):
    """The loading warpgroup: loads the rows once, then columns as slots become free."""
    plgpu.set_max_registers(REGISTERS["loading"], action="decrease")
    blocks = plan.blocks
    (own, _), (first, second) = _sides(role)[0], _sides(role)[1][0]
    of_rows, of_columns = _vectors(refs, role, blocks)
    for i in range(CONSUMERS):
        at = pl.ds(place.block * blocks.rows + i * blocks.part, blocks.part)
        heads = _heads(role, plan, place, None)
        targets = {name: refs[f"{name}_rows"].at[i] for name in own if f"{name}_rows" in refs}
        targets |= {name: vector.ref(refs, i) for name, vector in of_rows.items()}
        for name, target in targets.items():
            source = _source(refs, name, place, heads, at)
            plgpu.copy_gmem_to_smem(source, target, refs["rows_ready"])

    def step(visit, _):
        group, block = place.column_block(visit)
        heads = _heads(role, plan, place, group)
        at = pl.ds(block * blocks.columns, blocks.columns)

        def fill(ring, targets):
            slot = _slot(visit, refs[f"{ring}_free"])
            plgpu.barrier_wait(refs[f"{ring}_free"].at[slot])
            for name, target in targets.items():
                source = _source(refs, name, place, heads, at)
                plgpu.copy_gmem_to_smem(source, target(slot), refs[f"{ring}_ready"].at[slot])

        fill(first, {first: lambda slot: refs[f"{first}_ring"].at[slot]})
        if of_columns:
            ref = lambda vector: lambda slot: vector.ref(refs, slot)
            fill("vectors", {name: ref(vector) for name, vector in of_columns.items()})
        fill(second, {second: lambda slot: refs[f"{second}_ring"].at[slot]})

    jax.lax.fori_loop(jnp.int32(0), place.visits, step, None)


def _heads(role: Role, plan: Plan, place: Place, group) -> dict:
    """The query head and the key head; if rows are keys, the query head is that of `group`."""
    groups = jnp.int32(plan.groups)
    if not role.rows_are_keys:
        return dict(q=place.head, k=jax.lax.div(place.head, groups))
    return dict(q=None if group is None else place.head * groups + group, k=place.head)


def _source(refs: dict, name: str, place: Place, heads: dict, at):
    """The part of an array in global memory at the positions `at`."""
    if name.endswith("_segments"):
        return refs[name].at[place.batch, at]
    if name in ("lse", "delta"):
        return refs[name].at[place.batch, heads["q"], at]
    return refs[name].at[place.batch, at, heads["k" if name in KEY_SIDE[0] else "q"]]


def _slot(visit, barriers):
    return jax.lax.rem(visit, jnp.int32(barriers.shape[0]))


def _compute(refs: dict, role: Role, plan: Plan, place: Place, me):
    """A computing warpgroup: computes its part of the rows."""
    plgpu.set_max_registers(REGISTERS["computing"], action="increase")
    rows = _Rows(refs, role, plan, place, me)
    rows.free_all()
    plgpu.barrier_wait(refs["rows_ready"])
    state = rows.first()
    last = place.visits - 1
    if plan.schedule.partial:
        step = lambda visit, state: rows.next(visit, state, compare=True)
        state = jax.lax.fori_loop(jnp.int32(0), jnp.minimum(place.partial, last), step, state)
    if plan.schedule.full:
        step = lambda visit, state: rows.next(visit, state, compare=False)
        state = jax.lax.fori_loop(place.partial, last, step, state)
    rows.write(rows.next(last, state, compare=plan.schedule.partial, is_last=True))


class _State(NamedTuple):
    """The sums so far, None for those not in the role, and the products of the next visit."""

    of_scores: jax.Array | None  # [rows, head_dim]
    of_values: jax.Array | None  # [rows, head_dim]
    of_slope: jax.Array | None  # [rows]
    s: jax.Array | None  # [rows, columns] raw scores of the next visit; None after the last


class _Rows:
    """One warpgroup's part of the rows, and its work in a visit to a block of columns."""

    def __init__(self, refs: dict, role: Role, plan: Plan, place: Place, me):
        self.refs, self.role, self.plan, self.place, self.me = refs, role, plan, place, me
        (own, _), (self.columns, _) = _sides(role)
        self.of_rows, self.of_columns = _vectors(refs, role, plan.blocks)
        self.own_names = [f"{name}_rows" for name in own if f"{name}_rows" in refs]
        _, self.part, self.head_dim = refs[self.own_names[0]].shape
        self.start = place.block * plan.blocks.rows + me * self.part

    def _own(self, index: int):
        """This warpgroup's part of the first or second matrix of the rows.

        Its address is hidden from the compiler, which would otherwise compute the addresses of all
        slices of the tile before the loop over visits and run out of registers to keep them in.
        """
        return self.refs[self.own_names[index]].at[opaque(self.me)]

    def free_all(self):
        """Marks all slots of the rings as free."""
        for name in (*self.columns, "vectors"):
            if f"{name}_free" in self.refs:
                for slot in range(self.refs[f"{name}_free"].shape[0]):
                    plgpu.barrier_arrive(self.refs[f"{name}_free"].at[slot])

    def first(self) -> _State:
        """The state before visit 0."""
        s, _ = product(*self._scores(jnp.int32(0)))
        sums = lambda wanted: filled((self.part, self.head_dim), 0.0) if wanted else None
        of_slope = filled((self.part,), 0.0) if "dslopes" in self.refs else None
        if not self.role.scores:
            self._free(self.columns[0], jnp.int32(0))
        return _State(sums(self.role.scores), sums(self.role.values), of_slope, s)

    def next(self, visit, state: _State, *, compare: bool, is_last: bool = False) -> _State:
        """The state after `visit`."""
        role, interpret = self.role, self.plan.interpret
        first, second = self.columns
        of_scores, of_values, of_slope, s = state
        self._wait(second, visit)
        if "vectors_ready" in self.refs:
            self._wait("vectors", visit)
        b = self._block(second, visit)
        if role.scores:
            weights, ds, of_slope = self._ds(visit, s, b, of_slope, compare)
        else:
            weights, *_ = self._weights(visit, s, compare)
        self._free_vectors(visit)
        if role.values:
            weights = weights.astype(b.dtype)
            then = None if role.scores or is_last else self._scores(visit + 1)
            of_values, s = add_product(of_values, weights, b, then, interpret=interpret)
        self._free(second, visit)
        if role.scores:
            then = None if is_last else self._scores(visit + 1)
            b = self._block(first, visit)
            of_scores, s = add_product(of_scores, ds, b, then, interpret=interpret)
            self._free(first, visit)
        elif not is_last:
            self._free(first, visit + 1)
        return _State(of_scores, of_values, of_slope, s)

    def _ds(self, visit, s, b, of_slope, compare: bool):
        """(P, dS in b's dtype, of_slope including this visit) of the raw scores s; b is the operand
        of dP."""
        weigh = lambda: self._weights(visit, s, compare)
        # P is computed while dP is, unless positions need the registers.
        known = weigh() if compare or "slopes" in self.refs else None
        dp_less_delta, (weights, bent, ids) = product(
            self._own(1),
            b.transpose((1, 0)),
            weigh if known is None else lambda: known,
            onto=-self._vector("delta", visit, s.shape),
            interpret=self.plan.interpret,
        )
        ds = weights * dp_less_delta
        if of_slope is not None:
            of_slope = of_slope - (ds * distance(ids)).sum(axis=1)
        if bent is not None:
            ds = ds * (1 - bent * bent)
        return weights, ds.astype(b.dtype), of_slope

    def write(self, state: _State):
        """Writes the sums to global memory, through the shared memory of the rows."""
        refs, place = self.refs, self.place
        rows = pl.ds(self.start, self.part)
        prefix = "k" if self.role.rows_are_keys else "q"
        sums = {f"d{prefix}": state.of_scores, "dv": state.of_values}
        sums = {name: a for name, a in sums.items() if a is not None}
        tiles = [refs[name].at[self.me] for name in self.own_names]
        for (name, a), tile in zip(sums.items(), tiles, strict=False):
            scale = 1.0 if name == "dv" else self.plan.spec.scale
            tile[...] = (a * scale).astype(tile.dtype)
        if state.of_slope is not None:  # lse is no longer needed
            slope_part = self.of_rows["lse"].ref(refs, self.me)
            slope_part[...] = state.of_slope
        plgpu.commit_smem()
        for name, tile in zip(sums, tiles, strict=False):
            plgpu.copy_smem_to_gmem(tile, refs[name].at[place.batch, rows, place.head])
        if state.of_slope is not None:
            target = refs["dslopes"].at[place.batch, place.head, rows]
            plgpu.copy_smem_to_gmem(slope_part, target)
        plgpu.wait_smem_to_gmem(0)

    def _weights(self, visit, s, compare: bool):
        """(P, tanh of the soft cap or None, positions) of the raw scores s of a visit."""
        plan = self.plan
        ids = slope = None
        if compare or "slopes" in self.refs or "q_segments" in self.refs:
            ids, slope = self._ids(visit, s.shape)
        t, factor, bent = logits(s, ids, plan.spec, slope)
        kv_length = plan.kv_length if plan.k_padded else None
        t = hidden(t, ids, plan.spec, compare=compare, kv_length=kv_length)
        return jnp.exp2(t * factor - self._vector("lse", visit, s.shape)), bent, ids

    def _ids(self, visit, shape):
        """(positions and segments, Alibi's slope times log2(e) or None)."""
        refs, plan, place, keys = self.refs, self.plan, self.place, self.role.rows_are_keys
        group, block = place.column_block(visit)
        offset = plan.spec.q_offset
        if offset is None:
            offset = refs["q_offset"][place.batch]
        columns = block * plan.blocks.columns
        q_start, k_start = (columns, self.start) if keys else (self.start, columns)
        q_ids = positions(shape, int(keys), q_start + offset)
        ids = Ids(q_ids, positions(shape, 1 - keys, k_start))
        if "q_segments" in refs:
            names = ("q_segments", "k_segments")
            ids = Ids(*ids[:2], *(self._vector(name, visit, shape) for name in names))
        slope = None
        if "slopes" in refs:
            slope = refs["slopes"][_heads(self.role, plan, place, group)["q"]] * LOG2_E
        return ids, slope

    def _vector(self, name: str, visit, shape):
        """One number per row or per column, as a tile."""
        if name in self.of_rows:
            return across(load_rows(self.of_rows[name].ref(self.refs, self.me)), shape)
        slot = _slot(visit, self.refs["vectors_ready"])
        return down(load_columns(self.of_columns[name].ref(self.refs, slot)), shape)

    def _scores(self, visit):
        """The operands of a visit's scores, after waiting for its columns."""
        first = self.columns[0]
        self._wait(first, visit)
        return self._own(0), self._block(first, visit).transpose((1, 0))

    def _block(self, name: str, visit):
        ring = self.refs[f"{name}_ring"]
        return ring.at[_slot(visit, ring)]

    def _wait(self, ring: str, visit):
        barriers = self.refs[f"{ring}_ready"]
        plgpu.barrier_wait(barriers.at[_slot(visit, barriers)])

    def _free(self, ring: str, visit):
        barriers = self.refs[f"{ring}_free"]
        plgpu.barrier_arrive(barriers.at[_slot(visit, barriers)])

    def _free_vectors(self, visit):
        if "vectors_free" in self.refs:
            plgpu.commit_smem()  # ordinary reads; the slot will be overwritten
            self._free("vectors", visit)
