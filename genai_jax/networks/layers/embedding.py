"""Embedding lookup on a mesh that moves parts of the table instead of the batch's vectors."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from genai_jax.networks.parallel.axes import split_over


class Embed(nn.Module):
    """Looks up rows of the table `embedding` [num_rows, dim].

    Attributes:
      num_rows: number of rows of the table.
      dim: width of a row.
      rows_axis: logical axis of the rows in the sharding table; None if they are never split.
      dtype: dtype of the result.
    """

    num_rows: int
    dim: int
    rows_axis: str | None = None
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        init = nn.initializers.normal(0.02)
        self.embedding = self.param("embedding", init, (self.num_rows, self.dim), jnp.float32)

    def __call__(self, index: jax.Array) -> jax.Array:
        """[batch, length] integers -> [batch, length, dim]."""
        rows = split_over(self.rows_axis, self.num_rows) if self.rows_axis else ()
        return lookup(self.embedding, index, rows, self.dtype)


def lookup(
    table: jax.Array,
    index: jax.Array,
    rows: tuple[str, ...] = (),
    dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
    """table[index], [batch, length, dim], with batch and length split as in the sharding table.

    If the table and the indices are split over the same axis, XLA's partitioner gathers the vectors
    of the whole batch. Here, devices first gather the parts of the rows, then look up their own
    indices; the results are summed over `rows`, the mesh axes that split the rows.

    Args:
      table: [num_rows, dim], float32.
      index: [batch, length] integers in [0, num_rows).
      rows: mesh axes over which the rows are split.
      dtype: of the result, and of what devices exchange for it. Gradients, which are sums over all
        positions, are summed in float32: in bfloat16 a sum of ones stops at 256.
    """
    batch, length = (split_over(*a) for a in zip(("batch", "length"), index.shape, strict=True))
    embed = split_over("embed", table.shape[1])
    split = {*batch, *length, *embed, *rows}
    if not split:
        return jnp.take(table, index, axis=0).astype(dtype)
    spec = PartitionSpec(batch or None, length or None)
    return jax.shard_map(
        functools.partial(_lookup_here, embed, rows, dtype),
        in_specs=(PartitionSpec(rows or None, embed or None), spec),
        out_specs=spec,
        axis_names=split,
        check_vma=False,
    )(table, index)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _lookup_here(embed, rows, dtype, table, index):
    """On one device: its part of the table and its indices -> their vectors."""
    table = table.astype(dtype)
    if embed:
        table = jax.lax.all_gather(table, embed, axis=1, tiled=True)
    if not rows:
        return jnp.take(table, index, axis=0)
    place, is_here = _places(rows, table.shape[0], index)
    vectors = jnp.take(table, place, axis=0)
    return jax.lax.psum(jnp.where(is_here[..., None], vectors, 0), rows)


def _forward(embed, rows, dtype, table, index):
    return _lookup_here(embed, rows, dtype, table, index), (index, jnp.zeros((len(table), 0)))


def _backward(embed, rows, dtype, saved, cotangent):
    """The gradient of the device's part of the table, float32."""
    index, (num_rows, _) = saved[0], saved[1].shape
    cotangent = cotangent.astype(jnp.float32)
    if rows:
        index, is_here = _places(rows, num_rows, index)
        cotangent = jnp.where(is_here[..., None], jax.lax.psum(cotangent, rows), 0)
    grad = jnp.zeros((num_rows, cotangent.shape[-1]), jnp.float32).at[index].add(cotangent)
    if embed:
        grad = jax.lax.psum_scatter(grad, embed, scatter_dimension=1, tiled=True)
    return grad, None


_lookup_here.defvjp(_forward, _backward)


def _places(rows, num_rows: int, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(place of each index in this device's rows, whether it is there)."""
    place = index - jax.lax.axis_index(rows) * num_rows
    is_here = (place >= 0) & (place < num_rows)
    return jnp.where(is_here, place, 0), is_here
