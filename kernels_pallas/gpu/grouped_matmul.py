"""The grouped matmul on Hopper: `product` and `outer` on the main loop of `stream.py`.

`product`: one thread block per visit (`group_visits.py`) and block of columns, which writes only
the rows that belong to the visit. `outer` contracts over rows, and a step must not mix groups: it
reads copies in which every group begins at a whole step, with zeros in between.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..choose import check_not_split
from ..group_visits import group_visits
from ..padding import pad_length
from ..spec import Unsupported
from . import stream
from .plan import COMPILER_PARAMS, CONSUMERS, REGISTERS
from .stream import COLUMNS, DEPTH, PART, ROWS

DTYPES = ("bfloat16", "float16")
STAGES = 3
HALF = COLUMNS // 2  # columns written at a time


class Settings(NamedTuple):
    """interpret: as in `plgpu.kernel`."""

    interpret: object = None


DEFAULT = Settings()


def check(lhs, rhs, group_sizes):
    """Raises Unsupported(reason) for calls that these kernels do not support."""
    if str(lhs.dtype) not in DTYPES:
        raise Unsupported(f"dtype {lhs.dtype}; allowed: {', '.join(DTYPES)}")
    for name, size in (("in", rhs.shape[1]), ("out", rhs.shape[2])):
        if size % COLUMNS:
            raise Unsupported(f"{name} {size}; allowed: multiples of {COLUMNS}")
    check_not_split()


def product(lhs, rhs, group_sizes, dtype, transposed: bool, settings: Settings = DEFAULT):
    """[tokens, out]: lhs [tokens, in] by rhs [groups, in, out]; transposed: [groups, out, in]."""
    tokens, groups = lhs.shape[0], rhs.shape[0]
    width, steps = rhs.shape[1 if transposed else 2], lhs.shape[1] // DEPTH
    # The rows past all groups are an additional group, whose result is 0.
    rest = jnp.maximum(tokens - jnp.sum(group_sizes), 0).reshape(1)
    visits = group_visits(jnp.concatenate([group_sizes, rest]), tokens, ROWS)
    scratch = stream.ring(lhs.dtype, STAGES, right_transposed=transposed) | _out_part(dtype)
    names = ("block", "group", "start", "stop", "lhs", "rhs", "out", *scratch)

    def kernel(*refs):
        refs = dict(zip(names, refs, strict=True))
        visit, column = jax.lax.axis_index("visit"), jax.lax.axis_index("column") * COLUMNS
        block, group, start, stop = (refs[name][visit] for name in names[:4])
        count = jnp.where((stop > start) & (group < groups), steps, 0)
        matrix = jnp.minimum(group, groups - 1)
        columns = pl.ds(column, COLUMNS)

        def operands(step):
            depth = pl.ds(step * DEPTH, DEPTH)
            left = lambda i: refs["lhs"].at[pl.ds(block * ROWS + i * PART, PART), depth]
            at = (columns, depth) if transposed else (depth, columns)
            return left, refs["rhs"].at[matrix, *at]

        def finish(me, sums):
            at = block * ROWS + me * PART
            first = jnp.maximum(start, at) - at
            rows = jnp.maximum(jnp.minimum(stop - at, PART) - first, 0)
            part = refs["out_part"].at[me]

            def copy(half):
                columns = pl.ds(column + half, HALF)
                out = lambda some: refs["out"].at[pl.ds(at + some.start, some.size), columns]
                _copy_rows(part, out, first, rows)

            _write(part, sums, copy)

        _run(refs, count, operands, finish, right_transposed=transposed)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((tokens, width), dtype),
        scratch_types=list(scratch.values()),
        # The last dimension varies fastest: thread blocks that run together share few rows.
        grid=(visits.block.shape[0], width // COLUMNS),
        grid_names=("visit", "column"),
        **_launch(settings),
    )(*visits[:4], pad_length(lhs, 0, ROWS), rhs)


def outer(lhs, grad, group_sizes, dtype, settings: Settings = DEFAULT):
    """[groups, in, out]: lhs^T @ grad of each group's rows; 0 for a group without any."""
    groups, height, width = group_sizes.shape[0], lhs.shape[1], grad.shape[1]
    first, steps, source = _whole_steps(group_sizes, lhs.shape[0])
    spread = lambda a: a.at[source].get(mode="fill", fill_value=0)
    scratch = stream.ring(lhs.dtype, STAGES, left_transposed=True) | _out_part(dtype)
    names = ("first", "steps", "lhs", "grad", "out", *scratch)

    def kernel(*refs):
        refs = dict(zip(names, refs, strict=True))
        group, column = jax.lax.axis_index("group"), jax.lax.axis_index("column") * COLUMNS
        row = lambda i: jax.lax.axis_index("row") * ROWS + i * PART
        first, count = refs["first"][group], refs["steps"][group]

        def operands(step):
            depth = pl.ds((first + step) * DEPTH, DEPTH)
            # If `in` is an odd number of parts, the last one is read twice and written once.
            inside = lambda i: jnp.minimum(row(i), height - PART)
            left = lambda i: refs["lhs"].at[depth, pl.ds(inside(i), PART)]
            return left, refs["grad"].at[depth, pl.ds(column, COLUMNS)]

        def finish(me, sums):
            part, rows = refs["out_part"].at[me], pl.ds(row(me), PART)

            def copy(half):
                out = refs["out"].at[group, rows, pl.ds(column + half, HALF)]
                pl.when(row(me) < height)(lambda: plgpu.copy_smem_to_gmem(part, out))

            _write(part, sums, copy)

        _run(refs, count, operands, finish, left_transposed=True)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((groups, height, width), dtype),
        scratch_types=list(scratch.values()),
        grid=(groups, pl.cdiv(height, ROWS), width // COLUMNS),
        grid_names=("group", "row", "column"),
        **_launch(settings),
    )(first, steps, spread(lhs), spread(grad))


def _whole_steps(group_sizes, tokens: int):
    """(first step and number of steps of each group, source row of each row of the copies)."""
    groups = group_sizes.shape[0]
    sizes = group_sizes.astype(jnp.int32)
    steps = -(-sizes // DEPTH)
    ends, stops = jnp.cumsum(steps), jnp.cumsum(sizes)
    row = jnp.arange((tokens // DEPTH + groups) * DEPTH, dtype=jnp.int32)
    owner = jnp.searchsorted(ends * DEPTH, row, side="right", method="compare_all")
    group = jnp.minimum(owner, groups - 1)
    within = row - (ends - steps)[group] * DEPTH
    mine = (owner < groups) & (within < sizes[group])
    source = jnp.where(mine, (stops - sizes)[group] + within, tokens)  # past the end: 0
    return ends - steps, steps, source


def _run(refs: dict, count, operands, finish, **transposed):
    """A thread block: `count` steps of a product; finish(warpgroup, sums) writes the result."""
    warpgroup = jax.lax.axis_index("warpgroup")

    @pl.when(warpgroup < CONSUMERS)
    def _():
        plgpu.set_max_registers(REGISTERS["computing"], action="increase")
        stream.open_ring(refs)
        finish(warpgroup, stream.product(refs, warpgroup, jnp.int32(0), count, **transposed))

    @pl.when(warpgroup == CONSUMERS)
    def _():
        plgpu.set_max_registers(REGISTERS["loading"], action="decrease")
        step = lambda i, _: stream.load(refs, i, *operands(i))
        jax.lax.fori_loop(jnp.int32(0), count, step, None)


def _write(part, sums, copy):
    """Writes sums, half of the columns at a time: copy(first column) takes them from `part`."""
    for half in range(0, COLUMNS, HALF):
        _store(part, sums[:, half : half + HALF].astype(part.dtype))
        plgpu.commit_smem()
        copy(half)
        plgpu.wait_smem_to_gmem(0)


def _store(part, value):
    """part[...] = value. Rows that are copied one by one are not swizzled, so banks conflict; jax
    0.12 requires an option that says so, which jax 0.10 does not have."""
    if hasattr(plgpu, "store"):
        plgpu.store(part, value, optimized=False)
    else:
        part[...] = value


def _copy_rows(part, out, first, rows):
    """Copies `rows` rows of part, starting at `first`, to out(rows).

    A copy has a fixed number of rows, so `rows` is split into powers of two.
    """
    done, size = first, PART
    while size:
        some = pl.ds(done, size)
        copy = functools.partial(plgpu.copy_smem_to_gmem, part.at[some], out(some))
        pl.when(rows & size != 0)(copy)
        done, size = done + (rows & size), size // 2


def _out_part(dtype) -> dict:
    return dict(out_part=plgpu.SMEM((CONSUMERS, PART, HALF), dtype))


def _launch(settings: Settings) -> dict:
    return dict(
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=COMPILER_PARAMS,
        interpret=settings.interpret,
    )
