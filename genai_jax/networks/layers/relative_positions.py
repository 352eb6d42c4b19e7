"""Relative positions in buckets: a learned bias of attention scores by how far back a key is.

Raffel et al. 2020 (T5), section 2.1: half of the buckets hold one distance each, the others grow
with the logarithm of the distance, and the last holds all that is farther. The biases are one
number for each bucket and head, shared by all layers.
"""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp


def bucket_of(distance: jax.Array, buckets: int, furthest: int, both_sides: bool) -> jax.Array:
    """The bucket of each distance, position of the key less that of the query; integers.

    Args:
      distance: integers of any shape.
      buckets: number of buckets.
      furthest: distance from which on all share the last bucket.
      both_sides: whether keys after the query have the second half of the buckets for themselves;
        otherwise they share the bucket of distance 0.
    """
    offset = 0
    if both_sides:
        buckets //= 2
        offset, distance = jnp.where(distance > 0, buckets, 0), jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = buckets // 2
    growth = (buckets - exact) / math.log(furthest / exact)
    far = exact + jnp.floor(jnp.log(jnp.maximum(distance, exact) / exact) * growth + 1e-4)
    far = jnp.minimum(far, buckets - 1).astype(jnp.int32)
    return offset + jnp.where(distance < exact, distance, far)


class RelativeBias(NamedTuple):
    """Biases of attention scores; a pytree.

    Attributes:
      table: [buckets, heads], float32.
      matrix: [1, heads, length, length], the bias of each query (row) and key of a whole sequence;
        None while decoding.
    """

    table: jax.Array
    matrix: jax.Array | None = None

    def of_queries(self, positions: jax.Array, keys: int, furthest: int) -> jax.Array:
        """The biases of queries that look back on keys at 0, 1, ...: [batch, heads, new, keys].

        Args:
          positions: of the queries, [batch, new].
          keys: their number.
          furthest: see `bucket_of`.
        """
        distance = jnp.arange(keys) - positions[..., None]
        bias = self.table[bucket_of(distance, len(self.table), furthest, False)]
        return jnp.moveaxis(bias, -1, 1)


class RelativeTable(nn.Module):
    """The learned biases.

    Attributes:
      buckets, furthest, both_sides: see `bucket_of`.
      heads: number of heads.
    """

    buckets: int
    furthest: int
    both_sides: bool
    heads: int

    @nn.compact
    def __call__(self, length: int | None) -> RelativeBias:
        """The biases of a sequence of so many tokens; without a matrix for None."""
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
        table = self.param("table", init, (self.buckets, self.heads), jnp.float32)
        if length is None:
            return RelativeBias(table)
        # Distances 0, 1, ..., then -length, ..., -1. Each row of the matrix is the one before it,
        # shifted by one: a reshape, whose gradient is a sum and no scatter.
        distance = (jnp.arange(2 * length) + length) % (2 * length) - length
        values = table[bucket_of(distance, self.buckets, self.furthest, self.both_sides)].T
        rows = jnp.broadcast_to(values[:, None], (self.heads, length, 2 * length))
        flat = rows.reshape(self.heads, -1)[:, : length * (2 * length - 1)]
        matrix = flat.reshape(self.heads, length, 2 * length - 1)[:, :, :length]
        return RelativeBias(table, matrix[None])
