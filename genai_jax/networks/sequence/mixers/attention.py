"""Self-attention with grouped queries (Ainslie et al. 2023), the mixer of the transformer."""

import dataclasses
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

import kernels_pallas
from genai_jax.config import ConfigError
from genai_jax.networks.layers.dense import Dense, Norm
from genai_jax.networks.layers.positions import alibi_slopes, rotary, rotation
from genai_jax.networks.parallel.attention import attention
from genai_jax.networks.parallel.axes import (
    SEQUENCE,
    ParallelConfig,
    axis_size,
    describe_axis,
    token_order,
)
from genai_jax.networks.sequence.config import TransformerConfig
from genai_jax.networks.sequence.mixers.protocol import TokenContext
from genai_jax.networks.sequence.mixers.streaming import (
    StreamingState,
    first_of_documents,
    stream,
)


class AttentionState(NamedTuple):
    """Keys and values of earlier tokens, by position.

    It can be rewound by any number of tokens: a query sees no position after its own, and new
    tokens overwrite what was there. For the same reason padding that follows the real tokens of a
    row is never seen. Both need a causal mask.
    """

    cache: kernels_pallas.ContiguousCache

    def select(self, rows: jax.Array) -> "AttentionState":
        return jax.tree.map(lambda a: a[rows], self)

    def rewind(self, lengths: jax.Array) -> "AttentionState":
        """Nothing has to change: the next positions say where a row continues."""
        del lengths
        return self


class Attention(nn.Module):
    """Self-attention; causal and within the window of the config unless a mask is given.

    See `protocol.Mixer`.
    """

    config: TransformerConfig
    backend: str = "auto"
    dtype: jnp.dtype = jnp.float32
    parallel: ParallelConfig = ParallelConfig()

    PARTITION_RULES: ClassVar = (
        (r"query/kernel", ("embed", "heads", "head_dim")),
        (r"(key|value)/kernel", ("embed", "kv_heads", "head_dim")),
        (r"out/kernel", ("heads", "head_dim", "embed")),
        (r"query/bias", ("heads", "head_dim")),
        (r"(key|value)/bias", ("kv_heads", "head_dim")),
        (r"(query|key)_norm/scale", ("head_dim",)),
        (r"out/bias", ("embed",)),
    )

    @nn.compact
    def __call__(
        self, x: jax.Array, context: TokenContext, state: AttentionState | None = None
    ) -> tuple[jax.Array, AttentionState | None]:
        c = self.config

        def project(heads: int, name: str) -> jax.Array:
            shape = (heads, c.head_width)
            return Dense(shape, use_bias=c.use_bias, dtype=self.dtype, name=name)(x)

        q = project(c.num_heads, "query")
        k, v = project(c.kv_heads, "key"), project(c.kv_heads, "value")
        if c.qk_norm:
            q = Norm(dtype=self.dtype, name="query_norm")(q)
            k = Norm(dtype=self.dtype, name="key_norm")(k)
        plain = q
        if context.rotation is not None:
            q, k = rotary(q, context.rotation), rotary(k, context.rotation)
        if isinstance(state, StreamingState):
            out, state = self._continue_stream(plain, q, k, v, context, state)
        elif self.sinks_of(c):
            out = self._stream(plain, q, k, v, context)
        elif state is None:
            out = self._attend(q, k, v, context)
        else:
            out, state = self._decode(q, k, v, context, state)
        out = checkpoint_name(out, "attention")
        out_scale = 1 / (2 * c.num_layers)
        out = Dense(
            (c.embed_dim,), 2, use_bias=c.use_bias, init_scale=out_scale, dtype=self.dtype,
            name="out",
        )(out)  # fmt: skip
        return out, state

    def _slopes(self):
        c = self.config
        return alibi_slopes(c.num_heads) if c.positions == "alibi" else None

    @staticmethod
    def own_mask(config: TransformerConfig) -> kernels_pallas.Mask:
        """Which tokens a token sees unless the context says so: those before it in the window."""
        causal = kernels_pallas.Causal()
        if config.window is None:
            return causal
        return causal & kernels_pallas.Window(config.window, 0)

    def _mask(self, context: TokenContext) -> kernels_pallas.Mask:
        return self.own_mask(self.config) if context.mask is None else context.mask

    def _stream(self, plain, q, k, v, context: TokenContext) -> jax.Array:
        """Attention to the window and to the first tokens; `plain` are queries without rotation.

        Raises:
          ConfigError: a mesh that splits sequences.
          ValueError: another mask.
        """
        c = self.config
        if context.mask is not None:
            raise ValueError(f"sinks={c.sinks} cannot be combined with the mask {context.mask}")
        if axis_size(SEQUENCE) > 1:
            raise ConfigError(
                f"{describe_axis(SEQUENCE)}: sinks need whole sequences on a device "
                "(--transformer.sinks)"
            )
        first = first_of_documents(k, v, context.positions, context.segment_ids, c.sinks, c.window)
        first = (self._near(plain, context), *first)
        return self._see(q, k, v, first, context.segment_ids, q_offset=0, backend=self.backend)

    def _continue_stream(self, plain, q, k, v, context: TokenContext, state: StreamingState):
        """Attention of new tokens to those within reach, and to the first ones of their row.

        Returns the state with them.

        Raises:
          ValueError: another mask.
        """
        c, new, kept = self.config, k.shape[1], state.keys.shape[1]
        if context.mask is not None:
            raise ValueError(f"window={c.window}: decoding cannot be combined with {context.mask}")
        state = dataclasses.replace(state, length=context.positions[:, 0])
        there = jnp.arange(kept + new) + state.length[:, None] >= kept
        segments = jnp.ones(q.shape[:2], jnp.int32), there.astype(jnp.int32)
        state, keys, values = state.add(k, v, context.lengths)
        first, bias = None, None
        if self.sinks_of(c):
            each = lambda a: jnp.broadcast_to(a[:, None], (len(a), new, *a.shape[1:]))
            seen = context.positions[..., None] - jnp.arange(c.sinks) > c.window
            first = (self._near(plain, context), each(state.first_keys), each(state.first_values))
            first = (*first, seen)
        elif c.positions == "alibi":
            bias = kernels_pallas.Alibi(self._slopes())
        elif context.relative is not None:
            places = kept + jnp.arange(new)[None]
            bias = context.relative.of_queries(places, kept + new, c.furthest)
        # The backend of the run is for training; decoding chooses, as `kernels_pallas.decode` does.
        options = dict(q_offset=kept, bias=bias, backend="auto")
        return self._see(q, keys, values, first, segments, **options), state

    def _near(self, plain: jax.Array, context: TokenContext) -> jax.Array:
        """Queries for the first tokens: as far away as the window is long, or as they are."""
        c = self.config
        if context.rotation is None:
            return plain
        near = jnp.minimum(context.positions, c.window + c.sinks)
        return rotary(
            plain, rotation(near, c.head_width, theta=c.rope_theta, scaling=c.rotary_scaling)
        )

    def _see(self, q, keys, values, first, segment_ids, **options) -> jax.Array:
        c = self.config
        return stream(
            q, keys, values, first, segment_ids, mask=self.own_mask(c),
            scale=c.self_attention_scale, soft_cap=c.attention_soft_cap, **options,
        )  # fmt: skip

    def _attend(self, q, k, v, context: TokenContext) -> jax.Array:
        """Attention among the tokens of a row."""
        c, mask = self.config, self._mask(context)
        # Full attention is the same in any order of the tokens.
        full = isinstance(mask, kernels_pallas.Full)
        return attention(
            q, k, v, mask=mask, parallel=None if self.is_initializing() else self.parallel,
            order="contiguous" if full else token_order(self.parallel),
            segment_ids=context.segment_ids, slopes=self._slopes(),
            bias=None if context.relative is None else context.relative.matrix,
            scale=c.self_attention_scale,
            logits_soft_cap=c.attention_soft_cap, backend=self.backend,
        )  # fmt: skip

    def _decode(self, q, k, v, context: TokenContext, state: AttentionState):
        """Attention of new tokens to their row; returns the state with them.

        Raises:
          ValueError: a mask under which earlier tokens would see later ones.
        """
        if isinstance(self._mask(context), kernels_pallas.Full):
            raise ValueError("decoding token by token needs a causal mask, not full attention")
        c, slopes = self.config, self._slopes()
        ends = context.positions[:, 0] + q.shape[1]
        cache = kernels_pallas.append(state.cache, k, v, ends)
        if context.relative is not None:
            return self._decode_with_bias(q, cache, context), AttentionState(cache)
        out = kernels_pallas.decode(
            q, cache, lengths=ends, mask=self._mask(context), scale=c.self_attention_scale,
            logits_soft_cap=c.attention_soft_cap,
            bias=None if slopes is None else kernels_pallas.Alibi(slopes),
        )  # fmt: skip
        return out, AttentionState(cache)

    def _decode_with_bias(self, q, cache: kernels_pallas.ContiguousCache, context: TokenContext):
        """Attention of new tokens to the whole cache, with the bias of each query and key."""
        c, (k, v) = self.config, (jnp.swapaxes(a, 1, 2) for a in (cache.k, cache.v))
        bias = context.relative.of_queries(context.positions, k.shape[1], c.furthest)
        return kernels_pallas.attention(
            q, k, v, mask=self._mask(context), bias=bias, scale=c.self_attention_scale,
            logits_soft_cap=c.attention_soft_cap, q_offset=context.positions[:, 0],
        )  # fmt: skip

    @staticmethod
    def reach(config: TransformerConfig) -> int | None:
        """How far back a token sees, besides the first tokens; None: as far as there are tokens."""
        return config.window

    @staticmethod
    def sinks_of(config: TransformerConfig) -> int:
        """First tokens that a token sees besides those of the mask."""
        return config.sinks or 0

    @classmethod
    def empty_state(
        cls, config: TransformerConfig, batch: int, max_length: int, dtype, rewind: int = 0
    ) -> "AttentionState | StreamingState":
        """Keys and values of max_length tokens, or only of those within reach and `rewind` more.

        The former, [batch, kv_heads, max_length, head_dim], can be rewound by any number of tokens.
        """
        reach, sinks = cls.reach(config), cls.sinks_of(config)
        if sinks or (reach is not None and reach + rewind < max_length):
            shape = (sinks, reach, rewind, config.kv_heads, config.head_width)
            return StreamingState.empty(batch, *shape, dtype)
        return AttentionState(
            kernels_pallas.ContiguousCache.empty(
                batch, max_length, config.kv_heads, config.head_width, dtype
            )
        )

    @staticmethod
    def flops(config: TransformerConfig, length: int, layers: int) -> dict[str, float]:
        """`dense` for the projections; `attention` for the pairs that a causal mask leaves."""
        heads, kv_heads = config.num_heads * config.head_width, config.kv_heads * config.head_width
        seen = length if config.window is None else min(length, config.window + 1)
        sinks = sum(max(length - seen - s, 0) for s in range(config.sinks or 0)) / length
        return {
            "dense": 2 * layers * config.embed_dim * (2 * heads + 2 * kv_heads),
            "attention": 4 * layers * heads * (mean_keys(length, seen) + sinks),
        }


def mean_keys(length: int, seen: int) -> float:
    """Average number of keys of a query that sees itself and those before it, at most `seen`.

    The diagonal counts half, as it does in half of length x length, which this is without a window.
    """
    return seen - seen**2 / (2 * length)
