"""Decoding attention on Hopper: one thread block per (row, key head, part of its keys).

One warpgroup loads: it streams blocks of keys and values through a ring in shared memory that is
deep enough to keep the memory busy. The other one computes: the queries of all heads that share the
keys are the 64 rows of one wgmma. Few of these rows are used, but the tensor core is not the
bottleneck: at the speed of the memory it is a third busy. Keys beyond a row's length, or before the
first that its mask lets it see, are not read. `merge` combines the parts (Dao et al. 2023,
Flash-Decoding).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..caches import Cache, Int8, PagedCache, RingCache
from ..merge_parts import merge_parts
from ..padding import pad_length
from ..partition import over_mesh
from ..reach import first_key
from ..spec import Operands, Spec, Unsupported
from .plan import COMPILER_PARAMS, MATRIX_ROWS, SHARED_MEMORY, matrix, shared_memory
from .tile import LOG2_E, LOWEST, TILE, Ids, across, add_product, filled, logits, positions, product

DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (64, 128, 256)
KEYS = 64  # keys per visit
PROCESSORS = 132  # streaming multiprocessors of an H100 or H200
MAX_SPLITS = PROCESSORS


@dataclass(frozen=True)
class Settings:
    """How the kernel runs a call. stages: visits that shared memory holds; None: as many as fit.
    interpret: as in `plgpu.kernel`."""

    stages: int | None = None
    interpret: object = None


class Plan(NamedTuple):
    """Everything static about one kernel call."""

    spec: Spec
    q_length: int
    splits: int
    stages: int
    interpret: object


class Place(NamedTuple):
    """The place of a thread block; scalars at run time."""

    row: jax.Array
    head: jax.Array  # key head
    split: jax.Array
    length: jax.Array
    first: jax.Array  # the first key that the row sees
    start: jax.Array  # the first block of this part
    visits: jax.Array  # number of blocks in this part


def check(call, spec: Spec):
    """Raises Unsupported(reason) for calls that this kernel does not support."""
    _, _, groups, q_length, head_dim = call.q.shape
    cache, dtype = call.cache, str(call.q.dtype)
    if dtype not in DTYPES:
        raise Unsupported(f"dtype {dtype}; allowed: {', '.join(DTYPES)}")
    if isinstance(cache.k, Int8):
        raise Unsupported("an int8 cache")
    if head_dim not in HEAD_DIMS:
        raise Unsupported(f"head_dim {head_dim}; allowed: {', '.join(map(str, HEAD_DIMS))}")
    if groups * q_length > MATRIX_ROWS:
        raise Unsupported(
            f"{groups} heads per key head times q_length {q_length}; allowed: at most {MATRIX_ROWS}"
        )
    size = cache.page_size if isinstance(cache, PagedCache) else cache.slots
    whole = size % KEYS == 0
    if isinstance(cache, PagedCache):
        whole = whole or (KEYS % size == 0 and size % 8 == 0)
    if not whole or cache.slots % KEYS:
        kind = "page_size" if isinstance(cache, PagedCache) else "a cache of length"
        raise Unsupported(f"{kind} {size}; allowed: multiples of {KEYS}, also pages of 8, 16, 32")


def attention(call, spec: Spec, splits: int | None = None, settings: Settings | None = None):
    """See `decoding.Call`."""
    settings = settings or Settings()
    batch, kv_heads, groups, q_length, head_dim = call.q.shape
    rows = groups * q_length
    q = pad_length(call.q.reshape(batch, kv_heads, rows, head_dim), 2, MATRIX_ROWS)
    slopes = call.slopes
    if slopes is not None:
        slopes = jnp.repeat(slopes.astype(jnp.float32) * LOG2_E, q_length, axis=1)
        slopes = pad_length(slopes, 1, MATRIX_ROWS)
    leaves, kind = jax.tree.flatten(call.cache)
    stages = settings.stages or (3 if head_dim == 256 else 4)

    def run(x: Operands, *leaves):
        cache = jax.tree.unflatten(kind, leaves)
        parts = splits or _splits(x.q.shape[0] * x.q.shape[1], cache.slots // KEYS)
        plan = Plan(spec, q_length, parts, stages, settings.interpret)
        return _decode(x.q, cache, x.q_offset, x.slopes, -(-rows // 8) * 8, plan)

    # The queries take the place of the keys for `over_mesh`, because pages have no batch dimension.
    x = Operands(q=q, k=q, v=None, slopes=slopes, q_offset=call.lengths)
    paged = isinstance(call.cache, PagedCache)
    dims = ["pnmd", "pnmd", "bt"] if paged else ["bnmd", "bnmd"]
    out, lse = over_mesh(run, x, tuple(zip(dims, leaves, strict=True)), ("bnld", "bnl"))
    return out[:, :, :rows].reshape(call.q.shape), lse[:, :, :rows].reshape(call.q.shape[:4])


def _splits(lines: int, blocks: int) -> int:
    """Parts per (row, key head) pair, of which there are `lines`: the fewest that leave almost no
    processor idle in the last round."""
    counts = np.arange(1, max(min(MAX_SPLITS, blocks), 1) + 1)
    busy = lines * counts / (-(-lines * counts // PROCESSORS) * PROCESSORS)
    return int(counts[busy >= 0.95 * busy.max()][0])


def _decode(q, cache: Cache, lengths, slopes, rows: int, plan: Plan):
    """(out float32 [batch, kv_heads, rows, head_dim], lse [batch, kv_heads, rows])."""
    batch, kv_heads, _, head_dim = q.shape
    arrays = dict(q=q, k=cache.k, v=cache.v, lengths=lengths)
    if isinstance(cache, PagedCache):
        arrays["table"] = cache.page_table
    if slopes is not None:
        arrays["slopes"] = slopes
    whole = (plan.splits, batch, kv_heads, rows)
    outputs = [
        jax.ShapeDtypeStruct((*whole, head_dim), jnp.float32),
        jax.ShapeDtypeStruct(whole, jnp.float32),
    ]
    buffers = _scratch(q, cache, plan, slopes is not None)
    names = (*arrays, "out", "lse", *buffers)

    def decode_attention(*refs):
        _kernel(dict(zip(names, refs, strict=True)), cache, plan)

    out, lse = plgpu.kernel(
        decode_attention,
        out_type=outputs,
        scratch_types=list(buffers.values()),
        grid=(batch, kv_heads, plan.splits),
        grid_names=("row", "head", "split"),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=COMPILER_PARAMS,
        interpret=plan.interpret,
    )(*arrays.values())
    return merge_parts(out, lse)


def _piece(cache: Cache) -> int:
    """Keys per copy: those of a block, or of a page if pages are smaller."""
    return min(cache.page_size, KEYS) if isinstance(cache, PagedCache) else KEYS


def _scratch(q, cache: Cache, plan: Plan, slopes: bool) -> dict:
    head_dim, dtype, stages = q.shape[3], q.dtype, plan.stages
    copies = KEYS // _piece(cache)
    buffers = dict(
        q_tile=matrix((MATRIX_ROWS, head_dim), dtype),
        k_ring=matrix((stages, KEYS, head_dim), dtype),
        v_ring=matrix((stages, KEYS, head_dim), dtype),
        out_tile=matrix((MATRIX_ROWS, head_dim), jnp.float32),
        lse_tile=plgpu.SMEM((MATRIX_ROWS,), jnp.float32),
        q_ready=plgpu.Barrier(num_arrivals=2 if slopes else 1),
        k_ready=plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        v_ready=plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        free=plgpu.Barrier(num_barriers=stages),
    )
    if slopes:
        buffers["slopes_tile"] = plgpu.SMEM((MATRIX_ROWS,), jnp.float32)
    assert shared_memory(buffers) <= SHARED_MEMORY
    return buffers


def _kernel(refs: dict, cache: Cache, plan: Plan):
    warpgroup = jax.lax.axis_index("warpgroup")
    place = _place(refs, cache, plan)
    pl.when(warpgroup == 0)(lambda: _compute(refs, cache, plan, place))
    pl.when(warpgroup == 1)(lambda: _load(refs, cache, plan, place))


def _place(refs: dict, cache: Cache, plan: Plan) -> Place:
    row, head, split = (jax.lax.axis_index(name) for name in ("row", "head", "split"))
    length = refs["lengths"][row]
    stop = jax.lax.div(jnp.clip(length, 0, cache.slots) + (KEYS - 1), jnp.int32(KEYS))
    first = jnp.int32(0)
    if not isinstance(cache, RingCache):
        first = jnp.maximum(first_key(plan.spec.mask, length - plan.q_length), 0)
    begin = jnp.minimum(jax.lax.div(first, jnp.int32(KEYS)), stop)
    part = jax.lax.div(stop - begin + (plan.splits - 1), jnp.int32(plan.splits))
    start = begin + split * part
    return Place(row, head, split, length, first, start, jnp.clip(stop - start, 0, part))


def _load(refs: dict, cache: Cache, plan: Plan, place: Place):
    """The loading warpgroup: loads queries once, then keys and values as slots become free."""
    source = refs["q"].at[place.row, place.head]
    plgpu.copy_gmem_to_smem(source, refs["q_tile"], refs["q_ready"])
    if "slopes" in refs:
        source = refs["slopes"].at[place.head]
        plgpu.copy_gmem_to_smem(source, refs["slopes_tile"], refs["q_ready"])

    def step(visit, _):
        slot = jax.lax.rem(visit, jnp.int32(plan.stages))
        plgpu.barrier_wait(refs["free"].at[slot])
        for name in ("k", "v"):
            ring, ready = refs[f"{name}_ring"].at[slot], refs[f"{name}_ready"].at[slot]
            for source, rows in _sources(refs, name, cache, place, visit):
                plgpu.copy_gmem_to_smem(source, ring.at[rows], ready)

    jax.lax.fori_loop(jnp.int32(0), place.visits, step, None)


def _sources(refs: dict, name: str, cache: Cache, place: Place, visit):
    """(source in global memory, rows of the block) for the keys of a visit."""
    start = (place.start + visit) * KEYS
    if not isinstance(cache, PagedCache):
        yield refs[name].at[place.row, place.head, pl.ds(start, KEYS)], pl.ds(0, KEYS)
        return
    size = _piece(cache)
    last = jnp.minimum(place.length, cache.slots) - 1
    for piece in range(KEYS // size):
        # Pages outside what the row sees are not its own: use its first or last page instead.
        at = jnp.clip(start + piece * size, place.first, last)
        page = refs["table"][place.row, jax.lax.div(at, jnp.int32(cache.page_size))]
        page = jnp.clip(page, 0, cache.k.shape[0] - 1)
        inside = jax.lax.rem(start + piece * size, jnp.int32(cache.page_size))
        source = refs[name].at[page, place.head, pl.ds(inside, size)]
        yield source, pl.ds(piece * size, size)


def _compute(refs: dict, cache: Cache, plan: Plan, place: Place):
    """The computing warpgroup."""
    for slot in range(plan.stages):  # all slots of the ring start free
        plgpu.barrier_arrive(refs["free"].at[slot])
    plgpu.barrier_wait(refs["q_ready"])
    rows, head_dim = refs["q_tile"].shape
    state = (filled((rows, head_dim), 0.0), filled((rows,), LOWEST), filled((rows,), 0.0))
    step = lambda visit, state: _visit(refs, cache, plan, place, visit, state)
    sums, top, total = jax.lax.fori_loop(jnp.int32(0), place.visits, step, state)
    empty = total == 0
    inverse = jnp.where(empty, 0.0, 1 / jnp.where(empty, 1.0, total))
    refs["out_tile"][...] = sums * across(inverse, sums.shape)
    lse = top * (1 / LOG2_E) + jnp.log(jnp.where(empty, 1.0, total))
    refs["lse_tile"][...] = jnp.where(empty, -jnp.inf, lse)
    plgpu.commit_smem()
    at = (place.split, place.row, place.head)
    used = pl.ds(0, refs["lse"].shape[3])
    plgpu.copy_smem_to_gmem(refs["out_tile"].at[used], refs["out"].at[at])
    plgpu.copy_smem_to_gmem(refs["lse_tile"].at[used], refs["lse"].at[at])
    plgpu.wait_smem_to_gmem(0)


def _visit(refs: dict, cache: Cache, plan: Plan, place: Place, visit, state):
    """(sums, top, total) including the keys of a visit."""
    sums, top, total = state
    slot = jax.lax.rem(visit, jnp.int32(plan.stages))
    start = (place.start + visit) * KEYS
    plgpu.barrier_wait(refs["k_ready"].at[slot])
    s, _ = product(refs["q_tile"], refs["k_ring"].at[slot].transpose((1, 0)))
    k_ids, valid = _valid(cache, place, s.shape, 1, start)
    token = jax.lax.rem(positions(s.shape, 0, 0), jnp.int32(plan.q_length))
    ids = Ids(token + (place.length - plan.q_length), k_ids)
    slope = across(refs["slopes_tile"][...], s.shape) if "slopes" in refs else None
    t, factor, _ = logits(s, ids, plan.spec, slope)
    t = jnp.where(valid & plan.spec.mask.allowed(ids.q, ids.k), t, -jnp.inf)
    new_top = jnp.maximum(top, t.max(axis=1) * factor)
    weights = jnp.exp2(t * factor - across(new_top, t.shape))
    decay = jnp.exp2(top - new_top)
    total = total * decay + weights.sum(axis=1)
    sums = sums * across(decay, sums.shape)
    plgpu.barrier_wait(refs["v_ready"].at[slot])
    v = refs["v_ring"].at[slot]
    edge = (start < place.first) | (start + KEYS > place.length)
    pl.when(edge)(lambda: _clear(v, cache, place, start))
    sums, _ = add_product(sums, weights.astype(v.dtype), v, interpret=plan.interpret)
    plgpu.barrier_arrive(refs["free"].at[slot])
    return sums, new_top, total


def _valid(cache: Cache, place: Place, shape, axis: int, start):
    """(positions held by the slots from `start` on, whether each is visible)."""
    k_ids = cache.position(positions(shape, axis, start), place.length)
    return k_ids, (k_ids >= place.first) & (k_ids < place.length)


def _clear(v, cache: Cache, place: Place, start):
    """Zeroes the unused slots of a block of values, which may hold anything: 0 * nan is nan."""
    _, keep = _valid(cache, place, v.shape, 0, start)
    values = plgpu.layout_cast(v[...], TILE)
    v[...] = jnp.where(keep, values, jnp.zeros_like(values))
    plgpu.commit_smem()
