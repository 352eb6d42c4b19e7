"""Splits a kernel over the devices of the mesh in use (`jax.set_mesh`), along batch and heads.

A Pallas kernel is a black box to the compiler's partitioner, so the split is explicit here, with
`jax.shard_map`. Lengths and head dims are not split: along mesh axes that are not for batch or
heads, or that do not divide them, every device computes the same. Axes that are already manual
(inside a shard_map) are left as they are.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.sharding import AxisType, PartitionSpec

from .spec import Operands


class Axes(NamedTuple):
    """The mesh axes over which each dimension is split; names that the mesh lacks are ignored."""

    batch: tuple[str, ...] = ("data", "fsdp", "expert")
    heads: tuple[str, ...] = ("tensor",)


_chosen: contextvars.ContextVar[Axes | None] = contextvars.ContextVar("axes", default=None)

# Dimensions of the arrays of a call, one letter each: b batch, h heads, n key heads; others are not
# split.
DIMENSIONS = dict(
    q="bhld",
    k="bnmd",
    v="bnmd",
    slopes="h",
    q_segment_ids="bl",
    kv_segment_ids="bm",
    sinks="h",
    q_offset="b",
)


@contextlib.contextmanager
def mesh_axes(batch: tuple[str, ...] = (), heads: tuple[str, ...] = ()):
    """Context in which kernels are split over these mesh axes instead of the defaults of `Axes`.

    ValueError for a string in place of a tuple, and for an axis that is named twice.
    """
    for side, names in (("batch", batch), ("heads", heads)):
        if isinstance(names, str):
            raise ValueError(f"mesh_axes({side}={names!r}); allowed: a tuple of axis names")
    twice = [name for name in (*batch, *heads) if (*batch, *heads).count(name) > 1]
    if twice:
        raise ValueError(
            f"mesh axis {twice[0]!r} is named twice; allowed: once, for batch or heads"
        )
    token = _chosen.set(Axes(tuple(batch), tuple(heads)))
    try:
        yield
    finally:
        _chosen.reset(token)


def over_mesh(function: Callable, x: Operands, more: tuple, results: tuple[str, ...]):
    """`function(x, *arrays of more)`, on each device of the mesh with its part of batch and heads.

    x: heads-major arrays, q_offset [batch]. more: (dimensions, array) of each further argument.
    results: the dimensions of each array in the tuple that `function` returns.
    """
    arrays = [array for _, array in more]
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    free = [name for name, kind in kinds if kind != AxisType.Manual]
    if all(mesh.shape[name] == 1 for name in free):
        return function(x, *arrays)
    split = _split(x, {name: mesh.shape[name] for name in free})
    spec = lambda dims: PartitionSpec(*(split.get(letter) or None for letter in dims))
    given = Operands(*(None if a is None else spec(DIMENSIONS.get(n, "")) for n, a in _fields(x)))
    return jax.shard_map(
        function,
        in_specs=(given, *(spec(dims) for dims, _ in more)),
        out_specs=tuple(spec(dims) for dims in results),
        axis_names=set(free),
        check_vma=False,
    )(x, *arrays)


def _fields(x: Operands):
    return zip(Operands._fields, x, strict=True)


def _split(x: Operands, sizes: dict[str, int]) -> dict[str, tuple[str, ...]]:
    """{dimension letter: mesh axes that split it}; sizes: those of the available mesh axes."""

    def fitting(names, length):
        taken = []
        for name in names:
            if length % sizes.get(name, length + 1) == 0:
                taken.append(name)
                length //= sizes[name]
        return tuple(taken)

    axes = _chosen.get() or Axes()
    heads = fitting(axes.heads, x.k.shape[1])
    return {"b": fitting(axes.batch, x.q.shape[0]), "h": heads, "n": heads}
