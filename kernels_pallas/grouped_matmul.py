"""Rows sorted by group, each multiplied by its group's matrix: the matmul of a mixture of experts.

All backends and both gradients iterate over the visits of `group_visits.py`, so that work and
memory are those of one dense matmul of the rows, however many groups there are. On CPU and GPU,
`jax.lax.ragged_dot` computes every row with every group: compiled operations and memory grow with
the number of groups, and 2,048 rows in 64 groups took 9 to 25 times as long as with the "xla"
backend on a CPU (jax 0.10 and 0.12). On TPU, XLA has a kernel for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .choose import Backend, Rule, choose, kernels
from .device import HOPPER
from .group_visits import group_visits

DTYPES = ("float32", "bfloat16", "float16", "float64")


class Operation(NamedTuple):
    """The functions of a backend; group_sizes are int32 [groups].

    product(lhs [tokens, in], rhs [groups, in, out], group_sizes, dtype, transposed): [tokens, out];
    transposed: rhs is [groups, out, in].
    outer(lhs [tokens, in], grad [tokens, out], group_sizes, dtype): [groups, in, out].
    """

    product: Callable
    outer: Callable


def grouped_matmul(
    lhs, rhs, group_sizes, *, preferred_element_type=None, backend="auto"
) -> jax.Array:
    """out[i] = lhs[i] @ rhs[group of row i]; the rows of a group are consecutive.

    lhs          [tokens, in]: float32, bfloat16, float16 (float64 under x64)
    rhs          [groups, in, out], of the same dtype
    group_sizes  integers [groups], >= 0, summing to at most `tokens`: the first group_sizes[0] rows
                 belong to group 0, and so on. Values are known only at run time and not checked:
                 rows past the sum give 0, and groups are cut off at row `tokens`.
    preferred_element_type  dtype of the result; None: that of lhs. Sums are at least float32.
    backend      "auto", "xla", or "tpu" or "gpu" where available

    Returns [tokens, out]. Differentiable in lhs and rhs (reverse mode); the gradient of a group
    without rows is 0. Invalid arguments raise a one-line ValueError.
    """
    lhs, rhs, group_sizes = (jnp.asarray(a) for a in (lhs, rhs, group_sizes))
    dtype = jnp.dtype(preferred_element_type or lhs.dtype)
    _check(lhs, rhs, group_sizes, dtype)
    name, _ = choose(backend, BACKENDS, AUTO, lhs, rhs, group_sizes)
    return _grouped(lhs, rhs, group_sizes.astype(jnp.int32), dtype, name)


def explain(lhs, rhs, group_sizes, *, preferred_element_type=None, backend="auto") -> str:
    """Which backend `grouped_matmul` would choose, and why; also takes jax.ShapeDtypeStruct."""
    _check(lhs, rhs, group_sizes, jnp.dtype(preferred_element_type or lhs.dtype))
    return ": ".join(choose(backend, BACKENDS, AUTO, lhs, rhs, group_sizes))


def reference(lhs, rhs, group_sizes, *, preferred_element_type=None) -> jax.Array:
    """The definition: every row by every group's matrix, masked to the group of the row."""
    stop = jnp.cumsum(group_sizes)
    row = jnp.arange(lhs.shape[0])[:, None]
    mine = (row >= stop - group_sizes) & (row < stop)  # [tokens, groups]
    out = jnp.einsum("ti,tg,gio->to", lhs, mine.astype(lhs.dtype), rhs, precision="highest")
    return out.astype(preferred_element_type or lhs.dtype)


def _check(lhs, rhs, group_sizes, dtype):
    for name, a, rank, shape in (
        (("lhs", lhs, 2, "[tokens, in]")),
        ("rhs", rhs, 3, "[groups, in, out]"),
    ):
        if len(a.shape) != rank:
            raise ValueError(f"{name} has shape {tuple(a.shape)}; allowed: {shape}")
        if str(a.dtype) not in DTYPES:
            raise ValueError(f"{name} has dtype {a.dtype}; allowed: {', '.join(DTYPES)}")
        if 0 in a.shape:
            raise ValueError(f"{name} has shape {tuple(a.shape)}; every size must be >= 1")
    if lhs.dtype != rhs.dtype:
        raise ValueError(f"lhs and rhs have dtypes {lhs.dtype}, {rhs.dtype}; must be equal")
    if lhs.shape[1] != rhs.shape[1]:
        raise ValueError(f"lhs has in={lhs.shape[1]} and rhs in={rhs.shape[1]}; they must be equal")
    groups = rhs.shape[0]
    if tuple(group_sizes.shape) != (groups,) or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(
            f"group_sizes has shape {tuple(group_sizes.shape)}, dtype {group_sizes.dtype}; "
            f"allowed: integers [groups]=[{groups}]"
        )
    if str(dtype) not in DTYPES:
        raise ValueError(
            f"preferred_element_type is {dtype}; allowed: None or one of {', '.join(DTYPES)}"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _grouped(lhs, rhs, group_sizes, dtype, name):
    return BACKENDS[name].run.product(lhs, rhs, group_sizes, dtype, False)


def _forward(lhs, rhs, group_sizes, dtype, name):
    return _grouped(lhs, rhs, group_sizes, dtype, name), (lhs, rhs, group_sizes)


def _backward(dtype, name, residuals, grad):
    lhs, rhs, group_sizes = residuals
    run = BACKENDS[name].run
    grad = grad.astype(lhs.dtype)
    grad_lhs = run.product(grad, rhs, group_sizes, lhs.dtype, True)
    return grad_lhs, run.outer(lhs, grad, group_sizes, rhs.dtype), None


_grouped.defvjp(_forward, _backward)


def _xla_product(lhs, rhs, group_sizes, dtype, transposed):
    """A loop over the visits: a block of rows by one group's matrix, kept for the group's rows."""
    block = _xla_block(lhs.shape[0], rhs.shape[0])
    visits = group_visits(group_sizes, lhs.shape[0], block)
    width = rhs.shape[1 if transposed else 2]

    def visit(i, out):
        at, mine = _rows(visits, i, block, lhs.shape[0])
        matrix = jax.lax.dynamic_index_in_dim(rhs, visits.group[i], 0, keepdims=False)
        rows = jax.lax.dynamic_slice_in_dim(lhs, at, block)
        new = _matmul(rows, matrix, (1, 1 if transposed else 0)).astype(dtype)
        old = jax.lax.dynamic_slice_in_dim(out, at, block)
        return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(mine, new, old), at, 0)

    return jax.lax.fori_loop(0, visits.count[0], visit, jnp.zeros((lhs.shape[0], width), dtype))


def _xla_outer(lhs, grad, group_sizes, dtype):
    """A loop over the visits that adds up each group's lhs^T @ grad."""
    rows, groups = lhs.shape[0], group_sizes.shape[0]
    block = _xla_block(rows, groups)
    visits = group_visits(group_sizes, rows, block)

    def visit(i, sums):
        at, mine = _rows(visits, i, block, rows)
        a, b = (jnp.where(mine, jax.lax.dynamic_slice_in_dim(x, at, block), 0) for x in (lhs, grad))
        return sums.at[visits.group[i]].add(_matmul(a, b, (0, 0)))

    start = jnp.zeros((groups, lhs.shape[1], grad.shape[1]), _sum_dtype(lhs.dtype))
    return jax.lax.fori_loop(0, visits.count[0], visit, start).astype(dtype)


def _xla_block(rows: int, groups: int) -> int:
    """Rows per visit: about the average group size, so that little is computed and discarded."""
    even = max(rows // groups, 1)
    return min(max(16, 1 << (even.bit_length() - 1)), 256, rows)


def _rows(visits, i, block: int, rows: int):
    """(first row of visit i, bool [block, 1]: which rows belong to the visit)."""
    at = jnp.minimum(visits.block[i] * block, rows - block)
    row = at + jnp.arange(block)
    return at, ((row >= visits.start[i]) & (row < visits.stop[i]))[:, None]


def _sum_dtype(dtype):
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def _matmul(a, b, contract: tuple[int, int]):
    """a and b contracted over one axis of each, with sums in at least float32."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=_sum_dtype(a.dtype))


BACKENDS: dict[str, Backend] = {
    "xla": Backend(Operation(_xla_product, _xla_outer)),
    "tpu": kernels(Operation, "tpu.grouped_matmul", "tpu"),
    "gpu": kernels(Operation, "gpu.grouped_matmul", "gpu", HOPPER),
}

# The first rule that holds and whose backend can run the call decides.
AUTO: tuple[Rule, ...] = (
    Rule("tpu", "the kernels, forward and backward"),
    Rule("gpu", "the kernels, forward and backward"),
    Rule("xla", "a loop over the visits: the work of one matmul"),
)
