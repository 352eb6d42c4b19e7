"""Embedding lookup on a mesh that moves parts of the table instead of the batch's vectors."""

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
        # Vectors are cast after the lookup, so that their gradients are summed in float32.
        return lookup(self.embedding, index, rows).astype(self.dtype)


def lookup(table: jax.Array, index: jax.Array, rows: tuple[str, ...] = ()) -> jax.Array:
    """table[index], [batch, length, dim], with batch and length split as in the sharding table.

    If the table and the indices are split over the same axis, XLA's partitioner gathers the vectors
    of the whole batch. Here, devices first gather the parts of the rows, then look up their own
    indices; the results are summed over `rows`, the mesh axes that split the rows.

    Args:
      table: [num_rows, dim].
      index: [batch, length] integers in [0, num_rows).
      rows: mesh axes over which the rows are split.
    """
    batch, length = (split_over(*a) for a in zip(("batch", "length"), index.shape, strict=True))
    embed = split_over("embed", table.shape[1])
    split = {*batch, *length, *embed, *rows}
    if not split:
        return jnp.take(table, index, axis=0)

    def local(table, index):
        if embed:
            table = jax.lax.all_gather(table, embed, axis=1, tiled=True)
        if not rows:
            return jnp.take(table, index, axis=0)
        index = index - jax.lax.axis_index(rows) * table.shape[0]
        is_local = (index >= 0) & (index < table.shape[0])
        vectors = jnp.take(table, jnp.where(is_local, index, 0), axis=0)
        return jax.lax.psum(jnp.where(is_local[..., None], vectors, 0), rows)

    spec = PartitionSpec(batch or None, length or None)
    return jax.shard_map(
        local,
        in_specs=(PartitionSpec(rows or None, embed or None), spec),
        out_specs=spec,
        axis_names=split,
        check_vma=False,
    )(table, index)
