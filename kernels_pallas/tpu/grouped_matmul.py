"""The grouped matmul on TPU: two kernels that iterate over the visits of `group_visits.py`.

`product`: the visits of a block of rows are consecutive, so its output stays in VMEM until the last
group has written its rows. `outer`: the visits of a group are consecutive, so its sums stay in
VMEM. The number of visits is known only at run time and is a dimension of the grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..choose import check_not_split
from ..group_visits import group_visits
from ..spec import Unsupported
from .layout import vmem_capacity
from .products import add_product, cost
from .tile import LANES, positions

DTYPES = ("float32", "bfloat16", "float16")
SUBLANES = 16  # rows of a tile of 16-bit numbers, or of two tiles of 32-bit numbers


@dataclass(frozen=True)
class Blocks:
    """Largest block sizes. rows: tokens; inner: the dimension that `product` contracts; outer: the
    columns of its output, and both dimensions of the matrix that `outer` writes."""

    rows: int
    inner: int
    outer: int


class Settings(NamedTuple):
    """How the kernels run a call. interpret: as in `pallas_call`."""

    blocks: Blocks | None = None
    interpret: object = False


DEFAULT = Settings()


def check(lhs, rhs, group_sizes):
    """Raises Unsupported(reason) for calls that these kernels do not support."""
    if str(lhs.dtype) not in DTYPES:
        raise Unsupported(f"dtype {lhs.dtype}; allowed: {', '.join(DTYPES)}")
    check_not_split()


def product(lhs, rhs, group_sizes, dtype, transposed: bool, settings: Settings = DEFAULT):
    """[tokens, out]: lhs [tokens, in] by rhs [groups, in, out]; transposed: [groups, out, in]."""
    lhs, rhs = _widened(lhs), _widened(rhs)
    tokens, width = lhs.shape[0], rhs.shape[1 if transposed else 2]
    blocks = settings.blocks or _blocks(tokens, group_sizes.shape[0])
    rows = blocks.rows
    inner, columns = _divisor(lhs.shape[1], blocks.inner), _even(width, blocks.outer)
    lhs, rhs = _fill(lhs, 1, inner), _fill(rhs, 2 if transposed else 1, inner)
    visits = group_visits(group_sizes, tokens, rows, empty="rows")
    steps = lhs.shape[1] // inner

    def kernel(block, group, start, stop, lhs, rhs, out, sums):
        visit, step = pl.program_id(1), pl.program_id(2)
        first = (visit == 0) | (block[visit] != block[jnp.maximum(visit - 1, 0)])
        any_row = stop[visit] > start[visit]

        @pl.when(step == 0)
        def _():
            sums[...] = jnp.zeros_like(sums)

        @pl.when(any_row)
        def _():
            add_product(sums, lhs, rhs.at[0], (1, 1 if transposed else 0))

        @pl.when(step == steps - 1)
        def _():
            mine = _mine(out.shape, 0, block[visit] * rows, start[visit], stop[visit])
            others = jnp.where(first, 0, out[...].astype(jnp.float32))
            out[...] = jnp.where(mine, sums[...], others).astype(out.dtype)

    at = (lambda n, k: (n, k)) if transposed else (lambda n, k: (k, n))
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pl.cdiv(width, columns), visits.count[0], steps),
            in_specs=[
                pl.BlockSpec((rows, inner), lambda n, v, k, block, *_: (block[v], k)),
                pl.BlockSpec(
                    (1, *at(columns, inner)),
                    lambda n, v, k, block, group, *_: (group[v], *at(n, k)),
                ),
            ],
            out_specs=pl.BlockSpec((rows, columns), lambda n, v, k, block, *_: (block[v], n)),
            scratch_shapes=[pltpu.VMEM((rows, columns), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((tokens, width), _widened_dtype(dtype)),
        compiler_params=_parameters("parallel", "arbitrary", "arbitrary"),
        cost_estimate=cost(2 * tokens * lhs.shape[1] * width, lhs, rhs),
        interpret=settings.interpret,
        name="grouped_matmul",
    )(*visits[:4], lhs, rhs).astype(dtype)


def outer(lhs, grad, group_sizes, dtype, settings: Settings = DEFAULT):
    """[groups, in, out]: lhs^T @ grad of each group's rows; 0 for a group without any."""
    lhs, grad = _widened(lhs), _widened(grad)
    tokens, groups = lhs.shape[0], group_sizes.shape[0]
    blocks = settings.blocks or _blocks(tokens, groups)
    rows = blocks.rows
    down, across = _even(lhs.shape[1], blocks.outer), _even(grad.shape[1], blocks.outer)
    visits = group_visits(group_sizes, tokens, rows, empty="groups")

    def kernel(block, group, start, stop, lhs, grad, out, sums):
        visit, last = pl.program_id(2), pl.num_programs(2) - 1
        before, after = group[jnp.maximum(visit - 1, 0)], group[jnp.minimum(visit + 1, last)]
        count = stop[visit] - start[visit]

        @pl.when((visit == 0) | (group[visit] != before))
        def _():
            sums[...] = jnp.zeros_like(sums)

        @pl.when(count == rows)
        def _():
            add_product(sums, lhs, grad, (0, 0))

        @pl.when((count > 0) & (count < rows))
        def _():
            at = block[visit] * rows
            own = lambda first, shape, axis: _mine(
                shape, axis, at + first, start[visit], stop[visit]
            )
            add_product(sums, lhs, grad, (0, 0), keep=own)

        @pl.when((visit == last) | (group[visit] != after))
        def _():
            out[0] = sums[...].astype(out.dtype)

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pl.cdiv(lhs.shape[1], down), pl.cdiv(grad.shape[1], across), visits.count[0]),
            in_specs=[
                pl.BlockSpec((rows, down), lambda i, j, v, block, *_: (block[v], i)),
                pl.BlockSpec((rows, across), lambda i, j, v, block, *_: (block[v], j)),
            ],
            out_specs=pl.BlockSpec(
                (1, down, across), lambda i, j, v, block, group, *_: (group[v], i, j)
            ),
            scratch_shapes=[pltpu.VMEM((down, across), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(
            (groups, lhs.shape[1], grad.shape[1]), _widened_dtype(dtype)
        ),
        compiler_params=_parameters("parallel", "parallel", "arbitrary"),
        cost_estimate=cost(2 * lhs.size * grad.shape[1], lhs, grad),
        interpret=settings.interpret,
        name="grouped_outer",
    )(*visits[:4], lhs, grad).astype(dtype)


def _mine(shape, axis: int, at, start, stop):
    """Whether each index along `axis`, counted from `at`, is within [start, stop); bool [shape]."""
    row = positions(shape, axis, at)
    return (row >= start) & (row < stop)


def _widened(a):
    return a.astype(_widened_dtype(a.dtype))


def _widened_dtype(dtype):
    """The matrix unit has no float16; float32 holds all of its values."""
    return jnp.float32 if dtype == jnp.float16 else dtype


def _blocks(tokens: int, groups: int) -> Blocks:
    """Rows per block. About tokens + groups * rows are computed, so few if groups are small;
    otherwise enough that the matrix unit never waits for a matrix: a step does
    rows * outer / (rows + outer) operations per byte, at least 512 where memory is slowest relative
    to the unit (v6e needs 560) and 341 elsewhere."""
    largest = 1024 if vmem_capacity() > 100 << 20 else 512
    rows = min(max(1 << max((tokens // (4 * groups)).bit_length() - 1, 0), LANES), largest)
    rows = min(rows, -(-tokens // SUBLANES) * SUBLANES)
    if vmem_capacity() < 32 << 20:
        return Blocks(rows, 512, 512)
    return Blocks(rows, 512, 1024)


def _even(size: int, limit: int) -> int:
    """A block of at most `limit` that splits `size` evenly; the last one may exceed it."""
    if size <= limit:
        return size
    count = -(-size // limit)
    return -(-size // (count * LANES)) * LANES


def _divisor(size: int, limit: int) -> int:
    """A block of at most `limit` that divides `size`, or to which `size` is padded."""
    if size <= limit:
        return size
    best = max((b for b in range(LANES, limit + 1, LANES) if size % b == 0), default=0)
    return best if best >= limit // 4 else _even(size, limit)


def _fill(a, axis: int, block: int):
    """`a` padded with zeros to a multiple of `block` along `axis`."""
    missing = -a.shape[axis] % block
    if not missing:
        return a
    return jnp.pad(a, [(0, missing if i == axis else 0) for i in range(a.ndim)])


def _parameters(*semantics: str):
    return pltpu.CompilerParams(
        dimension_semantics=semantics, vmem_limit_bytes=vmem_capacity() * 3 // 4
    )
