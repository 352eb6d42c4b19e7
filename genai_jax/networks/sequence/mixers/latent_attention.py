"""Multi-head latent attention: keys and values from a small latent, which alone is cached.

DeepSeek-AI 2024 (DeepSeek-V2), section 2.1. The latent of a token gives the keys and values of all
heads. A second, rotated part of the keys, which the heads share, carries positions: a rotation
between latent and key would keep queries from being compared with the latent itself.
"""

import math
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

import kernels_pallas
from genai_jax.networks.layers.dense import Dense, Norm
from genai_jax.networks.layers.positions import rotary, rotation
from genai_jax.networks.parallel.attention import attention
from genai_jax.networks.parallel.axes import ParallelConfig, token_order
from genai_jax.networks.sequence.config import TransformerConfig
from genai_jax.networks.sequence.mixers.attention import Attention, mean_keys
from genai_jax.networks.sequence.mixers.protocol import TokenContext


class LatentState(NamedTuple):
    """Latents and rotated keys of earlier tokens, by position: [batch, max_length, size].

    For rewinding and padding it is like `attention.AttentionState`.
    """

    latent: jax.Array
    rotated: jax.Array

    def select(self, rows: jax.Array) -> "LatentState":
        return jax.tree.map(lambda a: a[rows], self)

    def rewind(self, lengths: jax.Array) -> "LatentState":
        """Nothing has to change: the next positions say where a row continues."""
        del lengths
        return self

    def append(self, latent: jax.Array, rotated: jax.Array, positions: jax.Array) -> "LatentState":
        """With new tokens at positions [batch, new]."""
        rows = jnp.arange(positions.shape[0])[:, None]
        write = lambda old, new: old.at[rows, positions].set(new.astype(old.dtype), mode="drop")
        return LatentState(write(self.latent, latent), write(self.rotated, rotated))


class LatentAttention(nn.Module):
    """See `protocol.Mixer`; `latent_dim` numbers a token for all heads, and `rotary_dim` more."""

    config: TransformerConfig
    backend: str = "auto"
    dtype: jnp.dtype = jnp.float32
    parallel: ParallelConfig = ParallelConfig()

    PARTITION_RULES: ClassVar = (
        (r"(query|rotated_query)/kernel", ("embed", "heads", "head_dim")),
        (r"(latent|rotated_key)/kernel", ("embed", "latent")),
        (r"latent_norm/scale", (None,)),
        (r"(key|value)/kernel", ("latent", "heads", "head_dim")),
        (r"out/kernel", ("heads", "head_dim", "embed")),
        (r"out/bias", ("embed",)),
    )

    def setup(self):
        c = self.config
        dense = lambda *shape: Dense(shape, dtype=self.dtype)
        self.query = dense(c.num_heads, c.head_width)
        self.rotated_query = dense(c.num_heads, c.rotated_width)
        self.latent, self.rotated_key = dense(c.latent_width), dense(c.rotated_width)
        self.latent_norm = Norm(dtype=self.dtype)
        self.key, self.value = (dense(c.num_heads, c.head_width) for _ in range(2))
        self.out = Dense(
            (c.embed_dim,), 2, use_bias=c.use_bias, init_scale=1 / (2 * c.num_layers),
            dtype=self.dtype,
        )  # fmt: skip

    def __call__(
        self, x: jax.Array, context: TokenContext, state: LatentState | None = None
    ) -> tuple[jax.Array, LatentState | None]:
        q, latent = self.query(x), self.latent_norm(self.latent(x))
        q_rotated, k_rotated = self.rotated_query(x), self.rotated_key(x)[:, :, None]
        if self.config.positions == "rope":
            angles = rotation(
                context.positions, self.config.rotated_width, theta=self.config.rope_theta,
                scaling=self.config.rotary_scaling,
            )  # fmt: skip
            q_rotated, k_rotated = rotary(q_rotated, angles), rotary(k_rotated, angles)
        k_rotated = k_rotated[:, :, 0]
        if state is None:
            out = self._attend(q, q_rotated, latent, k_rotated, context)
        else:
            state = state.append(latent, k_rotated, context.positions)
            out = self._decode(q, q_rotated, context, state)
        return self.out(checkpoint_name(out, "attention")), state

    own_mask = staticmethod(Attention.own_mask)
    _mask = Attention._mask

    @property
    def _scale(self) -> float:
        c = self.config
        return c.rotary_scaling.sharpness / math.sqrt(c.head_width + c.rotated_width)

    def _attend(self, q, q_rotated, latent, k_rotated, context: TokenContext) -> jax.Array:
        """Attention among the tokens of a row, with the keys and values of each head."""
        c, mask = self.config, self._mask(context)
        # Copied in float32, in which the gradients of the copies are then summed.
        shared = jnp.broadcast_to(k_rotated.astype(jnp.float32)[:, :, None], q_rotated.shape)
        shared = shared.astype(self.dtype)
        q = jnp.concatenate([q, q_rotated], -1)
        k = jnp.concatenate([self.key(latent), shared], -1)
        v = jnp.pad(self.value(latent), ((0, 0),) * 3 + ((0, c.rotated_width),))
        full = isinstance(mask, kernels_pallas.Full)
        out = attention(
            q, k, v, mask=mask, parallel=None if self.is_initializing() else self.parallel,
            order="contiguous" if full else token_order(self.parallel),
            segment_ids=context.segment_ids, slopes=None, scale=self._scale,
            logits_soft_cap=c.attention_soft_cap, backend=self.backend,
        )  # fmt: skip
        return out[..., : c.head_width]

    def _decode(self, q, q_rotated, context: TokenContext, state: LatentState) -> jax.Array:
        """Attention to the cached latents: queries are mapped to them, and their mix to values.

        Raises:
          ValueError: a mask under which earlier tokens would see later ones.
        """
        if isinstance(self._mask(context), kernels_pallas.Full):
            raise ValueError("decoding token by token needs a causal mask, not full attention")
        kernel = lambda layer: layer.variables["params"]["kernel"].astype(self.dtype)
        q = jnp.einsum("blhd,chd->blhc", q, kernel(self.key))
        scores = jnp.einsum("blhc,bkc->bhlk", q, state.latent.astype(self.dtype))
        scores += jnp.einsum("blhr,bkr->bhlk", q_rotated, state.rotated.astype(self.dtype))
        scores = scores.astype(jnp.float32) * self._scale
        if (cap := self.config.attention_soft_cap) is not None:
            scores = cap * jnp.tanh(scores / cap)
        places = jnp.arange(state.latent.shape[1])
        seen = self._mask(context).allowed(context.positions[..., None], places)
        weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), -1)
        mixed = jnp.einsum(
            "bhlk,bkc->blhc", weights.astype(self.dtype), state.latent.astype(self.dtype)
        )
        return jnp.einsum("blhc,chd->blhd", mixed, kernel(self.value))

    @staticmethod
    def empty_state(
        config: TransformerConfig, batch: int, max_length: int, dtype, rewind: int = 0
    ) -> LatentState:
        """Arrays [batch, max_length, latent_dim and rotary_dim]; any number can be rewound."""
        del rewind
        empty = lambda size: jnp.zeros((batch, max_length, size), dtype)
        return LatentState(empty(config.latent_width), empty(config.rotated_width))

    @staticmethod
    def flops(config: TransformerConfig, length: int, layers: int) -> dict[str, float]:
        """`dense` for the projections; `attention` for the pairs that a causal mask leaves."""
        c, heads = config, config.num_heads
        width, rotated, latent = c.head_width, c.rotated_width, c.latent_width
        dense = c.embed_dim * (heads * (2 * width + rotated) + latent + rotated)
        dense += 2 * latent * heads * width
        seen = length if c.window is None else min(length, c.window + 1)
        pairs = heads * (2 * width + rotated) * mean_keys(length, seen)
        return {"dense": 2 * layers * dense, "attention": 2 * layers * pairs}
