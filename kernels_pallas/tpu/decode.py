"""Decoding attention on TPU: one kernel that iterates over a flat list of (row, key block) visits.

For each row, the list holds exactly the blocks from the first key that its mask lets it see to its
last key. It is computed from the lengths at run time, and its length is a dimension of the grid. So
nothing beyond a row's end costs a read or a grid step, and the first block of the next row arrives
while the last one is being computed. Split into equal parts, one per core, the list balances rows
of any lengths (like the stream-K decomposition of Osama et al. 2023): a row that crosses a split
gives two partial softmaxes, which `merge` combines.

One matmul multiplies all query heads of a key head by its keys; int8 is widened in VMEM.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..caches import Cache, Int8, PagedCache, RingCache
from ..device import device_kind
from ..merge_parts import merge_parts
from ..padding import pad_length
from ..partition import over_mesh
from ..reach import first_key
from ..spec import Operands, Spec, Unsupported
from .layout import vmem_capacity
from .tile import (
    LANES,
    LOG2_E,
    LOWEST,
    Ids,
    across,
    capped,
    distance,
    lane_sums,
    matmul,
    positions,
)

DTYPES = ("float32", "bfloat16")
HEAD_DIM_LIMIT = 256
Q_LENGTH_LIMIT = 16
VISIT_BYTES = 2 << 20  # of keys and values: a read long enough to hide the cost of a grid step
VISIT_KEYS = 512  # at most, so that one head's scores fit the registers
SLOW_INT8 = ("TPU v4",)  # 3.6 times as long as the read, by the compiler's bundles
MAX_PAGES = 16  # per visit, each with its own copy
SMEM_BYTES = 512 << 10  # for the list of visits and the page table


@dataclass(frozen=True)
class Settings:
    """How the kernel runs a call. block: keys per visit, whole pages; None: from VISIT_BYTES and
    VISIT_KEYS. interpret: as in `pallas_call`."""

    block: int | None = None
    interpret: object = False


class Plan(NamedTuple):
    """Everything static about one kernel call."""

    spec: Spec
    q_length: int
    block: int  # keys per visit
    heads: int  # key heads per visit
    splits: int
    interpret: object


class Visits(NamedTuple):
    """`splits` parts of `steps` visits each; visits from `total` on do nothing."""

    row: jax.Array  # [size] int32
    block: jax.Array  # [size] int32
    steps: jax.Array  # [1] int32
    total: jax.Array  # [1] int32
    ends: jax.Array  # [batch] int32: the visits of a row are the `count` visits before its end
    count: jax.Array  # [batch] int32


def check(call, spec: Spec):
    """Raises Unsupported(reason) for calls that this kernel does not support."""
    batch, kv_heads, _, q_length, head_dim = call.q.shape
    cache, dtype = call.cache, str(call.q.dtype)
    if dtype not in DTYPES:
        raise Unsupported(f"dtype {dtype}; allowed: {', '.join(DTYPES)}")
    if head_dim > HEAD_DIM_LIMIT or head_dim % 8:
        raise Unsupported(f"head_dim {head_dim}; allowed: multiples of 8 up to {HEAD_DIM_LIMIT}")
    if q_length > Q_LENGTH_LIMIT:
        raise Unsupported(f"q_length {q_length}; allowed: at most {Q_LENGTH_LIMIT}")
    if isinstance(cache.k, Int8) and device_kind() in SLOW_INT8:
        raise Unsupported(f"int8 on {device_kind()}, which widens it slower than it reads")
    if isinstance(cache, PagedCache):
        step = LANES if isinstance(cache.k, Int8) else 32 // cache.k.dtype.itemsize
        if cache.page_size % step:
            raise Unsupported(
                f"page_size {cache.page_size} of {cache.k.dtype}; allowed: multiples of {step}"
            )
    block = _block(cache, _heads(kv_heads))
    numbers = 2 * batch * -(-cache.slots // block)
    if isinstance(cache, PagedCache):
        numbers += batch * cache.page_table.shape[1]
    if 4 * numbers > SMEM_BYTES:
        raise Unsupported(
            f"{batch} rows of {cache.slots} slots need {4 * numbers} bytes of visits and pages; "
            f"allowed: {SMEM_BYTES}"
        )


def attention(call, spec: Spec, splits: int | None = None, settings: Settings | None = None):
    """See `decoding.Call`."""
    settings = settings or Settings()
    batch, kv_heads, groups, q_length, head_dim = call.q.shape
    rows = groups * q_length
    pad = functools.partial(pad_length, block=8)
    q = pad(call.q.reshape(batch, kv_heads, rows, head_dim), 2)
    slopes = call.slopes
    if slopes is not None:
        slopes = jnp.repeat(slopes.astype(jnp.float32) * LOG2_E, q_length, axis=1)
        slopes = jnp.broadcast_to(pad(slopes, 1)[..., None], (*q.shape[1:3], LANES))
    leaves, kind = jax.tree.flatten(call.cache)

    def run(x: Operands, *leaves):
        cache = jax.tree.unflatten(kind, leaves)
        heads = _heads(cache.k.shape[1])
        block = settings.block or _block(cache, heads)
        plan = Plan(spec, q_length, block, heads, splits or _cores(), settings.interpret)
        return _decode(x.q, cache, x.q_offset, x.slopes, plan)

    # The queries take the place of the keys for `over_mesh`, because pages have no batch dimension.
    x = Operands(q=q, k=q, v=None, slopes=slopes, q_offset=call.lengths)
    more = tuple(zip(_dimensions(call.cache), leaves, strict=True))
    out, lse = over_mesh(run, x, more, ("bnld", "bnl"))
    return out[:, :, :rows].reshape(call.q.shape), lse[:, :, :rows].reshape(call.q.shape[:4])


def _dimensions(cache: Cache) -> list[str]:
    """The dimensions of each array of the cache, as `over_mesh` takes them."""
    values = "pnmd" if isinstance(cache, PagedCache) else "bnmd"
    kinds = [values, values[:3]] if isinstance(cache.k, Int8) else [values]
    return [*kinds, *kinds, *(["bt"] if isinstance(cache, PagedCache) else [])]


def _heads(kv_heads: int) -> int:
    """Key heads per visit: as many as a tile of scales holds, or all."""
    return 8 if kv_heads % 8 == 0 else kv_heads


def _block(cache: Cache, heads: int) -> int:
    """Keys per visit."""
    per_key = 2 * heads * max(cache.k.shape[3], LANES) * cache.k.dtype.itemsize
    keys = min(max(VISIT_BYTES // per_key // LANES, 1) * LANES, VISIT_KEYS)
    if not isinstance(cache, PagedCache):
        return min(keys, cache.slots)
    pages = min(max(keys // cache.page_size, 1), MAX_PAGES, cache.page_table.shape[1])
    return pages * cache.page_size


def _cores() -> int:
    """Tensor cores of the device to compile for."""
    try:
        return pltpu.get_tpu_info().num_cores
    except ValueError:  # no TPU: the interpreter
        return 1


def _first_key(plan: Plan, length):
    return jnp.maximum(first_key(plan.spec.mask, length - plan.q_length), 0)


def _visits(cache: Cache, lengths, plan: Plan) -> Visits:
    per_row = -(-cache.slots // plan.block)
    stop = -(-jnp.clip(lengths, 0, cache.slots) // plan.block)
    first = jnp.zeros_like(stop)
    if not isinstance(cache, RingCache):
        first = jnp.minimum(_first_key(plan, lengths) // plan.block, stop)
    count = stop - first
    ends = jnp.cumsum(count)
    total = ends[-1]
    size = -(-lengths.shape[0] * per_row // plan.splits) * plan.splits
    at = jnp.minimum(jnp.arange(size, dtype=jnp.int32), jnp.maximum(total - 1, 0))
    # The row of a visit is the number of rows that have ended before it. Comparing all pairs is
    # fastest for few rows.
    row = jnp.sum(ends[:, None] <= at, axis=0, dtype=jnp.int32)
    row = jnp.minimum(row, lengths.shape[0] - 1)
    block = first[row] + at - (ends - count)[row]
    steps = jnp.maximum(-(-total // plan.splits), 1)
    return Visits(row, jnp.maximum(block, 0), steps[None], total[None], ends, count)


def _pages(cache: PagedCache, visits: Visits, lengths, plan: Plan):
    """The pages of each visit, consecutively; outside what a row sees, its first or last page is
    repeated."""
    pieces = plan.block // cache.page_size
    row = visits.row[:, None]
    last = (jnp.clip(lengths, 1, cache.slots) - 1) // cache.page_size
    first = jnp.minimum(_first_key(plan, lengths) // cache.page_size, last)
    page = visits.block[:, None] * pieces + jnp.arange(pieces, dtype=jnp.int32)
    page = cache.page_table[row, jnp.clip(page, first[row], last[row])]
    return jnp.clip(page, 0, cache.k.shape[0] - 1).reshape(-1)


def _decode(q, cache: Cache, lengths, slopes, plan: Plan):
    """(out float32 [batch, kv_heads, rows, head_dim], lse [batch, kv_heads, rows])."""
    batch, kv_heads, rows, head_dim = q.shape
    visits = _visits(cache, lengths, plan)
    scalars = dict(row=visits.row, block=visits.block, total=visits.total, lengths=lengths)
    if isinstance(cache, PagedCache):
        scalars["pages"] = _pages(cache, visits, lengths, plan)
    arrays, specs = _inputs(q, cache, slopes, plan)
    shape = (1, 1, plan.heads, rows)
    output = lambda *more: pl.BlockSpec(
        (*shape, *more), lambda c, h, s, row, *_: (c, row[_at(c, s)], h, 0, *[0] * len(more))
    )
    scratch = dict(
        top=pltpu.VMEM((plan.heads, rows, LANES), jnp.float32),
        normalizer=pltpu.VMEM((plan.heads, rows, LANES), jnp.float32),
        sums=pltpu.VMEM((plan.heads, rows, head_dim), jnp.float32),
    )
    names = (*scalars, *arrays, "out", "lse", *scratch)
    whole = (plan.splits, batch, kv_heads, rows)
    out, lse = pl.pallas_call(
        lambda *refs: _step(dict(zip(names, refs, strict=True)), cache, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(plan.splits, kv_heads // plan.heads, visits.steps[0]),
            in_specs=list(specs.values()),
            out_specs=[output(head_dim), output()],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[
            jax.ShapeDtypeStruct((*whole, head_dim), jnp.float32),
            jax.ShapeDtypeStruct(whole, jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=vmem_capacity() * 3 // 4,
        ),
        interpret=plan.interpret,
        name="decode_attention",
    )(*scalars.values(), *arrays.values())
    return _join(out, lse, visits, plan)


def _join(out, lse, visits: Visits, plan: Plan):
    """Merges the parts; a part that did not visit a row has left that row's output unwritten."""
    starts = jnp.arange(plan.splits, dtype=jnp.int32)[:, None] * visits.steps
    touched = (starts < visits.ends) & (starts + visits.steps > visits.ends - visits.count)
    touched = (touched & (visits.count > 0))[:, :, None, None]
    lse = jnp.where(touched, lse, -jnp.inf)
    out = jnp.where(touched[..., None], out, 0)
    return merge_parts(out, lse)


def _at(part, step):
    """The index of a visit."""
    return part * pl.num_programs(2) + step


def _inputs(q, cache: Cache, slopes, plan: Plan):
    """({name: array}, {name: block}); each page of a visit is a separate block."""
    heads, rows, head_dim = plan.heads, *q.shape[2:]
    at_row = lambda c, h, s, row, *_: (row[_at(c, s)], h, 0, 0)
    arrays = dict(q=q)
    specs = dict(q=pl.BlockSpec((1, heads, rows, head_dim), at_row))
    if slopes is not None:
        arrays["slopes"] = slopes
        specs["slopes"] = pl.BlockSpec((heads, rows, LANES), lambda c, h, s, *_: (h, 0, 0))
    paged = isinstance(cache, PagedCache)
    pieces, length = (plan.block // cache.page_size, cache.page_size) if paged else (1, plan.block)
    for name, buffer in (("k", cache.k), ("v", cache.v)):
        parts = {name: buffer}
        if isinstance(buffer, Int8):
            parts = {name: buffer.values, f"{name}_scales": buffer.scales}
        for part, a in parts.items():
            for j in range(pieces):
                arrays[f"{part}{j}"] = a
                index = functools.partial(_piece, pieces, j, a.ndim)
                specs[f"{part}{j}"] = pl.BlockSpec((1, heads, length, *a.shape[3:]), index)
    return arrays, specs


def _piece(pieces: int, piece: int, ndim: int, c, h, s, row, block, total, lengths, pages=None):
    """The location of a piece of a visit's keys: in a page if there are pages, else in its row."""
    visit, more = _at(c, s), (0,) * (ndim - 3)
    if pages is None:
        return row[visit], h, block[visit], *more
    return pages[visit * pieces + piece], h, 0, *more


def _step(refs: dict, cache: Cache, plan: Plan):
    """One visit."""
    step, visit = pl.program_id(2), _at(pl.program_id(0), pl.program_id(2))
    total = refs["total"][0]
    live = visit < total
    row = refs["row"][visit]
    begins = (step == 0) | (row != refs["row"][jnp.maximum(visit - 1, 0)])
    last = (step == pl.num_programs(2) - 1) | (visit == total - 1)
    ends = last | (row != refs["row"][jnp.minimum(visit + 1, refs["row"].shape[0] - 1)])
    start = refs["block"][visit] * plan.block
    length = refs["lengths"][row]
    first = _first_key(plan, length)
    # Unused slots may hold anything, so their values must be cleared: 0 * nan is nan.
    edge = start + plan.block > length
    if isinstance(cache, RingCache):
        edge |= start + plan.block > cache.slots
    else:
        edge |= (start < first) | (start + plan.block > cache.slots)

    @pl.when(live & begins)
    def _():
        refs["top"][...] = jnp.full_like(refs["top"], LOWEST)
        refs["normalizer"][...] = jnp.zeros_like(refs["normalizer"])
        refs["sums"][...] = jnp.zeros_like(refs["sums"])

    pl.when(live & edge)(lambda: _visit(refs, cache, plan, start, length, clear=True))
    pl.when(live & ~edge)(lambda: _visit(refs, cache, plan, start, length, clear=False))
    pl.when(live & ends)(lambda: _end(refs, plan))


def _valid(cache: Cache, plan: Plan, shape, axis: int, start, length):
    """(positions held by the slots from `start` on, whether each is visible)."""
    slots = positions(shape, axis, start)
    k_ids = cache.position(slots, length)
    if isinstance(cache, RingCache):
        return k_ids, (k_ids >= 0) & (slots < cache.slots)
    valid = (k_ids >= _first_key(plan, length)) & (k_ids < length)
    return k_ids, valid & (slots < cache.slots)


def _visit(refs: dict, cache: Cache, plan: Plan, start, length, *, clear: bool):
    """Adds the keys of a visit to the sums of all heads."""
    rows = refs["q"].shape[2]
    shape = (rows, plan.block)
    k_ids, valid = _valid(cache, plan, shape, 1, start, length)
    token = 0 if plan.q_length == 1 else positions(shape, 0, 0) % plan.q_length
    ids = Ids(length - plan.q_length + token + jnp.zeros_like(k_ids), k_ids)
    visible = valid & plan.spec.mask.allowed(ids.q, ids.k)

    def add(head):
        s = matmul(refs["q"][0, head], _keys(refs, "k", head), (1, 1))
        if "k_scales0" in refs:
            s = s * _scales(refs, "k", head)
        s, _ = capped(s, plan.spec)
        if "slopes" in refs:
            s = s - distance(ids) * across(refs["slopes"][head], plan.block)
        s = jnp.where(visible, s, -jnp.inf)
        before = refs["top"][head]
        top = jnp.maximum(before, s.max(axis=1, keepdims=True))
        weights = jnp.exp2(s - across(top, plan.block))
        decay = jnp.exp2(before - top)
        refs["top"][head] = top
        refs["normalizer"][head] = decay * refs["normalizer"][head] + _sums(weights)
        if "v_scales0" in refs:
            weights = weights * jnp.where(valid[:1], _scales(refs, "v", head), 0)
        v = _keys(refs, "v", head)
        if clear:
            _, keep = _valid(cache, plan, v.shape, 0, start, length)
            v = jnp.where(keep, v.astype(jnp.float32), 0).astype(v.dtype)
        added = matmul(weights.astype(v.dtype), v, (1, 0))
        refs["sums"][head] = across(decay, v.shape[1]) * refs["sums"][head] + added

    pl.loop(0, plan.heads)(add)  # not unrolled: one head at a time fits the registers


def _pieces(refs: dict, name: str) -> list:
    return [ref for key, ref in refs.items() if key.rstrip("0123456789") == name]


def _keys(refs: dict, name: str, head: int):
    """[block, head_dim] of one head, in the dtype of the queries."""
    pieces = [ref[0, head] for ref in _pieces(refs, name)]
    a = pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=0)
    return a.astype(refs["q"].dtype)


def _scales(refs: dict, name: str, head: int):
    """[1, block] of one head."""
    pieces = [ref[0, pl.ds(head, 1)] for ref in _pieces(refs, f"{name}_scales")]
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=1)


def _sums(weights):
    """[rows, block] -> [rows, LANES]: 128 partial sums that add up to the sum of a row."""
    whole = weights.shape[1] // LANES * LANES
    sums = lane_sums(weights[:, :whole]) if whole else 0.0
    if whole == weights.shape[1]:
        return sums
    # The sum of the rest is spread evenly over the lanes.
    return sums + jnp.sum(weights[:, whole:], axis=1, keepdims=True) / LANES


def _end(refs: dict, plan: Plan):
    """Writes out and lse; 0 and -inf where no key was visible."""
    for head in range(plan.heads):
        total = jnp.sum(refs["normalizer"][head], axis=1, keepdims=True)
        empty = total == 0
        refs["out"][0, 0, head] = refs["sums"][head] * jnp.where(empty, 0.0, 1 / total)
        lse = jnp.where(empty, LOWEST, refs["top"][head] + jnp.log2(total)).T[:1]  # all lanes equal
        refs["lse"][0, 0, pl.ds(head, 1)] = jnp.where(lse <= LOWEST, -jnp.inf, lse / LOG2_E)
