"""Attention of a decoder to what an encoder has read, with keys and values that are kept."""

from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

import kernels_pallas
from genai_jax.networks.layers.dense import Dense, Norm
from genai_jax.networks.sequence.config import TransformerConfig


class CrossState(NamedTuple):
    """The state of a block with cross-attention: that of its mixer, and what it sees of the source.

    Attributes:
      own: of the mixer.
      keys, values: [batch, source_length, kv_heads, head_dim].
    """

    own: NamedTuple
    keys: jax.Array
    values: jax.Array

    def select(self, rows: jax.Array) -> "CrossState":
        return CrossState(self.own.select(rows), self.keys[rows], self.values[rows])

    def rewind(self, lengths: jax.Array) -> "CrossState":
        """The source stays."""
        return self._replace(own=self.own.rewind(lengths))


class CrossAttention(nn.Module):
    """Attention to the tokens of a source (Vaswani et al. 2017, section 3.2.3), without positions.

    A token whose segment has no source gets nothing.
    """

    config: TransformerConfig
    backend: str = "auto"
    dtype: jnp.dtype = jnp.float32

    PARTITION_RULES: ClassVar = (
        (r"query/kernel", ("embed", "heads", "head_dim")),
        (r"(key|value)/kernel", ("embed", "kv_heads", "head_dim")),
        (r"out/kernel", ("heads", "head_dim", "embed")),
        (r"query/bias", ("heads", "head_dim")),
        (r"(key|value)/bias", ("kv_heads", "head_dim")),
        (r"(query|key)_norm/scale", ("head_dim",)),
        (r"out/bias", ("embed",)),
    )

    def setup(self):
        c = self.config
        dense = lambda heads: Dense((heads, c.head_width), use_bias=c.use_bias, dtype=self.dtype)
        self.query, self.key, self.value = (dense(n) for n in (c.num_heads, c.kv_heads, c.kv_heads))
        if c.qk_norm:
            self.query_norm, self.key_norm = Norm(dtype=self.dtype), Norm(dtype=self.dtype)
        self.out = Dense(
            (c.embed_dim,), 2, use_bias=c.use_bias, init_scale=1 / (2 * c.num_layers),
            dtype=self.dtype,
        )  # fmt: skip

    def keys_and_values(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Each [batch, source_length, kv_heads, head_dim]."""
        k = self.key(hidden)
        return (self.key_norm(k) if self.config.qk_norm else k), self.value(hidden)

    def __call__(
        self, x: jax.Array, keys: jax.Array, values: jax.Array, segment_ids: tuple
    ) -> jax.Array:
        """[batch, length, embed_dim] -> the same shape.

        Args:
          x: tokens of the target.
          keys, values: of the source, as `keys_and_values` returns them.
          segment_ids: of the targets [batch, length], and of the source [batch, source_length].
        """
        c = self.config
        q = self.query(x)
        q = self.query_norm(q) if c.qk_norm else q
        seen = kernels_pallas.attention(
            q, keys, values, mask=kernels_pallas.Full(), segment_ids=segment_ids,
            scale=c.attention_scale, logits_soft_cap=c.attention_soft_cap, backend=self.backend,
        )  # fmt: skip
        return self.out(seen)

    @staticmethod
    def flops(config: TransformerConfig, source_length: int, length: int) -> dict[str, float]:
        """Forward FLOPs of all layers per token of the target, by part; nothing is masked."""
        heads, kv_heads = config.num_heads * config.head_width, config.kv_heads * config.head_width
        shared = source_length / length  # keys and values are computed once for a row
        return {
            "dense": 4 * config.num_layers * config.embed_dim * (heads + kv_heads * shared),
            "attention": 4 * config.num_layers * heads * source_length,
        }
