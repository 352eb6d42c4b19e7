"""Bidirectional self-attention and cross-attention of the image networks."""

import flax.linen as nn
import jax
import jax.numpy as jnp

import kernels_pallas
from genai_jax.networks.layers.dense import Dense, Norm
from genai_jax.networks.layers.positions import Rotation, rotary
from genai_jax.networks.parallel.attention import attention
from genai_jax.networks.parallel.axes import ParallelConfig


class Attention(nn.Module):
    """Multi-head attention without a causal mask.

    Attributes:
      num_heads: heads of queries, keys and values.
      head_dim: width of a head.
      qk_norm: whether to apply RMSNorm to queries and keys.
      out_scale: initial variance of the output projection, times fan-in; 0 for zeros.
      parallel: how x is split over the sequence axis; None if it is not.
    """

    num_heads: int
    head_dim: int
    qk_norm: bool = False
    out_scale: float = 1.0
    backend: str = "auto"
    dtype: jnp.dtype = jnp.float32
    parallel: ParallelConfig | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        context: jax.Array | None = None,
        context_mask: jax.Array | None = None,
        rotate_by: Rotation | None = None,
    ) -> jax.Array:
        """[batch, length, dim] -> [batch, length, dim].

        Args:
          x: source of the queries.
          context: [batch, context_length, context_dim], source of keys and values; x if None.
          context_mask: [batch, context_length] bool, False for padding.
          rotate_by: rotary angles of x, for self-attention.
        """
        source = x if context is None else context
        q, k, v = Projection(
            self.num_heads, self.head_dim, self.qk_norm, self.dtype, name="project"
        )(x, source)
        if rotate_by is not None:
            q, k = rotary(q, rotate_by), rotary(k, rotate_by)
        parallel = None if self.is_initializing() else self.parallel
        out = attend(q, k, v, context_mask, self.backend, parallel)
        return Dense(
            x.shape[-1:], 2, use_bias=True, init_scale=self.out_scale, dtype=self.dtype, name="out"
        )(out)


class Projection(nn.Module):
    """Queries from x, keys and values from `source`, each [batch, length, heads, head_dim]."""

    num_heads: int
    head_dim: int
    qk_norm: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, source: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        shape = (self.num_heads, self.head_dim)
        dense = lambda name: Dense(shape, use_bias=True, dtype=self.dtype, name=name)
        q, k, v = dense("query")(x), dense("key")(source), dense("value")(source)
        if self.qk_norm:
            q = Norm(dtype=self.dtype, name="query_norm")(q)
            k = Norm(dtype=self.dtype, name="key_norm")(k)
        return q, k, v


def attend(q, k, v, kv_mask, backend, parallel=None) -> jax.Array:
    """Attention of every query to every key in `kv_mask`, [batch, length, heads, head_dim]."""
    segment_ids = None
    if kv_mask is not None:
        segment_ids = (jnp.ones(q.shape[:2], jnp.int32), kv_mask.astype(jnp.int32))
    return attention(
        q, k, v, mask=kernels_pallas.Full(), parallel=parallel, segment_ids=segment_ids,
        backend=backend,
    )  # fmt: skip


# Parameter path -> logical axes; a stack of blocks adds a leading axis.
PARTITION_RULES = (
    (r"(query|key|value)/kernel", ("embed", "heads", "head_dim")),
    (r"(query|key|value)/bias", ("heads", "head_dim")),
    (r"(query|key)_norm/scale", ("head_dim",)),
    (r"attention/out/kernel", ("heads", "head_dim", "embed")),
    (r"attention/out/bias", ("embed",)),
)


def stacked(pattern: str, rules: tuple, axis: str = "blocks") -> tuple:
    """The rules for blocks under a path that matches `pattern`, stacked on a leading axis."""
    return tuple((f"{pattern}.*{path}", (axis, *axes)) for path, axes in rules)
