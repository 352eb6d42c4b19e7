"""Flash attention backward (Dao 2023, algorithm 2) in one kernel of five matmuls.

Scores are kept transposed, [keys, queries]: per-query values are then rows, and four of the matmuls
need no transposed operand. The visits are those of the forward pass. The gradient of a query block
is summed over its key blocks; those of keys and values are summed in VMEM over all queries of all
heads that share them. The order is fixed, so the result is deterministic. If VMEM cannot hold the
gradients of all keys, the keys are split over several calls.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..padding import pad_length
from ..spec import Operands
from . import layout
from .layout import Here, Plan, head
from .tile import LOG2_E, Ids, as_columns, capped, distance, hidden, matmul, positions
from .visits import FIRST, LAST, PATTERN_SHIFT, Run


def backward(x: Operands, dout, lse, delta, plan: Plan, dq_dtype):
    """(dq, dk, dv) of one call's keys, and dslopes [batch, heads] if x has slopes.

    x heads-major, its keys those of this call; dq as dq_dtype; dout like x.q; lse and delta float32
    [batch, heads, q_length], delta being sum(out * dout) minus the gradient of lse.
    """
    batch, _, q_length, head_dim = x.q.shape
    kv_heads, kv_length = x.k.shape[1:3]
    blocks = plan.blocks
    arrays = dict(
        q=pad_length(x.q, 2, blocks.q),
        k=pad_length(x.k, 2, blocks.k),
        v=pad_length(x.v, 2, blocks.k),
        dout=pad_length(dout, 2, blocks.q),
        lse=_rows(jnp.where(lse == -jnp.inf, jnp.inf, lse), blocks.q, jnp.inf),
        delta=_rows(delta, blocks.q, 0),
    )
    query = layout.query_spec((blocks.q, head_dim), plan)
    row = layout.query_spec((1, blocks.q), plan, row=True)
    key = layout.key_spec((blocks.k, head_dim), plan)
    specs = dict(q=query, k=key, v=key, dout=query, lse=row, delta=row)
    segments = layout.segment_arrays(x, plan)
    if segments:
        arrays, specs = arrays | segments, specs | layout.segment_specs(plan)
    scalars = layout.scalars(x._replace(sinks=None), plan)
    outputs, out_specs = _outputs(x, arrays, plan, query, dq_dtype)
    padded = arrays["k"].shape[2]
    scratch = dict(
        dq_sums=pltpu.VMEM((head_dim, blocks.q), jnp.float32),
        dk_sums=pltpu.VMEM((padded, head_dim), jnp.float32),
        dv_sums=pltpu.VMEM((padded, head_dim), jnp.float32),
    )
    names = (*scalars, *arrays, *outputs, *scratch)
    grads = pl.pallas_call(
        lambda *refs: _step(dict(zip(names, refs, strict=True)), plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch, kv_heads, plan.groups, len(plan.visits.flags)),
            in_specs=[specs[name] for name in arrays],
            out_specs=list(out_specs.values()),
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=list(outputs.values()),
        compiler_params=layout.compiler_params(plan, sequential_groups=True),
        cost_estimate=layout.cost(x, plan, matmuls=5),
        interpret=plan.interpret,
        name="flash_attention_backward",
    )(*scalars.values(), *arrays.values())
    dq, dk, dv, *rest = grads
    dslopes = [a.sum((2, 3)) for a in rest]
    return dq[:, :, :q_length], dk[:, :, :kv_length], dv[:, :, :kv_length], *dslopes


def _rows(a, block: int, value):
    return pad_length(a, 2, block, value)[:, :, None]


def _outputs(x: Operands, arrays: dict, plan: Plan, query, dq_dtype):
    """({name: shape}, {name: block}) of the gradients; those of a whole key head stay in VMEM."""
    batch, heads = x.q.shape[:2]
    like = lambda name, dtype: jax.ShapeDtypeStruct(arrays[name].shape, dtype)
    shape = (1, 1, *arrays["k"].shape[2:])
    whole = pl.BlockSpec(shape, lambda b, n, g, s, *_: (b, n, 0, 0))
    outputs = dict(dq=like("q", dq_dtype), dk=like("k", x.k.dtype), dv=like("v", x.v.dtype))
    specs = dict(dq=query, dk=whole, dv=whole)
    if x.slopes is not None:
        width = plan.blocks.sub_q
        outputs["dslopes"] = jax.ShapeDtypeStruct((batch, heads, 1, width), jnp.float32)
        at = lambda b, n, g, s, *_: (b, head(n, g, plan), 0, 0)
        specs["dslopes"] = pl.BlockSpec((1, 1, 1, width), at)
    return outputs, specs


def _step(refs: dict, plan: Plan):
    """One grid step: one key block for one query block."""
    at = layout.here(plan)
    flag = refs["flags"][at.visit]
    last_visit = at.visit == len(plan.visits.flags) - 1

    @pl.when((at.group == 0) & (at.visit == 0))
    def _():
        _for_key_blocks(refs, plan, _begin_keys)

    if "dslopes" in refs:

        @pl.when(at.visit == 0)
        def _():
            refs["dslopes"][...] = jnp.zeros_like(refs["dslopes"])

    @pl.when(flag & FIRST != 0)
    def _():
        refs["dq_sums"][...] = jnp.zeros_like(refs["dq_sums"])

    for index, pattern in enumerate(plan.visits.patterns):

        @pl.when(flag >> PATTERN_SHIFT == index)
        def _(pattern=pattern):
            for r, run in enumerate(pattern):
                if run.start < run.stop:
                    _accumulate(refs, plan, at, r * plan.blocks.sub_q, run)

    @pl.when(flag & LAST != 0)
    def _():
        dq = refs["dq_sums"][...].T * plan.spec.scale
        refs["dq"][0, 0] = dq.astype(refs["dq"].dtype)

    @pl.when((at.group == plan.groups - 1) & last_visit)
    def _():
        _for_key_blocks(refs, plan, _end_keys)


def _for_key_blocks(refs: dict, plan: Plan, body):
    """A loop, since unrolled over thousands of keys it would be most of the program."""
    size = plan.blocks.k

    def step(j, _):
        body(refs, plan, pl.ds(pl.multiple_of(j * size, size), size))

    jax.lax.fori_loop(0, refs["dk_sums"].shape[0] // size, step, None)


def _begin_keys(refs: dict, plan: Plan, keys):
    for name in ("dk_sums", "dv_sums"):
        refs[name][keys] = jnp.zeros((plan.blocks.k, refs[name].shape[1]), jnp.float32)


def _end_keys(refs: dict, plan: Plan, keys):
    dtype = refs["dk"].dtype
    refs["dk"][0, 0, keys] = (refs["dk_sums"][keys] * plan.spec.scale).astype(dtype)
    refs["dv"][0, 0, keys] = refs["dv_sums"][keys].astype(dtype)


def _accumulate(refs: dict, plan: Plan, at: Here, first: int, run: Run):
    """Adds the contributions of the queries from `first` on and the keys of `run`."""
    rows, keys = pl.ds(first, plan.blocks.sub_q), pl.ds(run.start, run.stop - run.start)
    q, dout = refs["q"][0, 0, rows], refs["dout"][0, 0, rows]
    k, v = refs["k"][0, 0, keys], refs["v"][0, 0, keys]
    s, bent = capped(matmul(k, q, (1, 1)), plan.spec)
    ids = _ids(refs, plan, at, s.shape, first, run)
    if "slopes" in refs:
        s = s - distance(ids) * (refs["slopes"][at.head] * LOG2_E)
    s = hidden(s, ids, run, plan.spec, key_axis=0, kv_length=plan.padded)
    weights = jnp.exp2(s - refs["lse"][0, 0, :, rows] * LOG2_E)
    ds = weights * (matmul(v, dout, (1, 1)) - refs["delta"][0, 0, :, rows])
    if "slopes" in refs:
        refs["dslopes"][0, 0] -= jnp.sum(ds * distance(ids), axis=0, keepdims=True)
    if bent is not None:
        ds = ds * (1 - bent * bent)
    sums = pl.ds(refs["k_block"][at.visit] * plan.blocks.k + run.start, run.stop - run.start)
    ds = ds.astype(q.dtype)
    refs["dv_sums"][sums] += matmul(weights.astype(dout.dtype), dout, (1, 0))
    refs["dk_sums"][sums] += matmul(ds, q, (1, 0))
    refs["dq_sums"][:, rows] += matmul(k, ds, (0, 0))


def _ids(refs: dict, plan: Plan, at: Here, shape, first: int, run: Run) -> Ids:
    start = plan.k_start + refs["k_block"][at.visit] * plan.blocks.k + run.start
    q_ids = positions(shape, 1, layout.q_start(refs, plan, at) + first)
    k_ids = positions(shape, 0, start)
    if "q_segments" not in refs:
        return Ids(q_ids, k_ids)
    columns = as_columns(refs["k_segments"][0, :, pl.ds(run.start, shape[0])])
    return Ids(
        q_ids,
        k_ids,
        refs["q_segments"][0, :, pl.ds(first, shape[1])],
        jnp.broadcast_to(columns[:, :1], shape),
    )
