"""Gated linear attention, and the gated delta rule."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from genai_jax.networks.layers.causal_convolution import CausalConvolution
from genai_jax.networks.layers.dense import Norm
from genai_jax.networks.sequence.config import TransformerConfig
from genai_jax.networks.sequence.mixers.mamba import inverse_softplus_of_steps
from genai_jax.networks.sequence.mixers.mamba2 import log_uniform_decays
from genai_jax.networks.sequence.mixers.recurrent import Call, Recurrent
from genai_jax.networks.sequence.recurrences.delta_rule import delta_rule, delta_rule_step
from genai_jax.networks.sequence.recurrences.linear_attention import (
    linear_attention,
    linear_attention_step,
)

RANK = 16  # of the projection to the decays
SLOW = 16  # decays are sigmoids to the power 1 / 16, so that they begin close to 1

_HEADS = (
    (r"(query|key|value|gate)/kernel", ("embed", "heads", "head_dim")),
    (r"read_norm/scale", ("head_dim",)),
    (r"out/kernel", ("heads", "head_dim", "embed")),
    (r"out/bias", ("embed",)),
)


class GatedLinearAttention(Recurrent):
    """A matrix of keys and values per head with a decay per key (Yang et al. 2024a).

    Keys are half as wide as values, as in the paper; `num_heads` heads.
    """

    PARTITION_RULES: ClassVar = (
        *_HEADS,
        (r"decay_in/kernel", ("embed", None)),
        (r"decay/kernel", (None, "heads", "head_dim")),
        (r"decay/bias", ("heads", "head_dim")),
    )

    def mix(self, x: jax.Array, call: Call) -> jax.Array:
        heads, values = self.config.num_heads, self.config.head_width
        keys = max(1, values // 2)
        q = self.dense(heads, keys, name="query")(x) * keys**-0.5
        k = self.dense(heads, keys, name="key")(x)
        v = self.dense(heads, values, name="value")(x)
        decay = self.dense(RANK, name="decay_in")(x)
        decay = self.dense(heads, keys, name="decay", use_bias=True)(decay).astype(jnp.float32)
        log_decay = nn.log_sigmoid(decay) / SLOW
        y = call.recur(linear_attention_step, linear_attention, q, k, v, log_decay)
        y = Norm(dtype=self.dtype, name="read_norm")(y)
        gate = nn.silu(self.dense(heads, values, name="gate")(x))
        return self.project_out(y * gate, num_in=2)

    @classmethod
    def empty_value(cls, config: TransformerConfig, batch: int) -> dict:
        values = config.head_width
        return {"memory": jnp.zeros((batch, config.num_heads, max(1, values // 2), values))}

    @classmethod
    def flops(cls, config: TransformerConfig, length: int, layers: int) -> dict[str, float]:
        """`dense` for the projections; `recurrence` as token by token: 6 per key and value."""
        heads, values = config.num_heads, config.head_width
        keys = max(1, values // 2)
        dense = config.embed_dim * (heads * (2 * keys + 3 * values) + RANK) + RANK * heads * keys
        return {"dense": 2 * layers * dense, "recurrence": 6 * layers * heads * keys * values}


class GatedDeltaRule(Recurrent):
    """Gated DeltaNet: a key first takes back what it had stored (Yang et al. 2024b).

    Queries, keys and values pass through a short convolution; queries and keys have length 1.
    """

    PARTITION_RULES: ClassVar = (
        *_HEADS,
        (r"convolution/kernel", (None, None)),
        (r"convolution/bias", (None,)),
        (r"(rate|step)/kernel", ("embed", "heads")),
        (r"(step_bias|log_decay)", ("heads",)),
    )

    def mix(self, x: jax.Array, call: Call) -> jax.Array:
        c, rows = self.config, x.shape[:2]
        heads, width = c.num_heads, c.head_width
        parts = [self.dense(heads, width, name=n)(x) for n in ("query", "key", "value")]
        both = jnp.concatenate([p.reshape(*rows, heads * width) for p in parts], -1)
        both = nn.silu(call.convolve(CausalConvolution(c.taps, name="convolution"), both))
        q, k, v = (p.reshape(*rows, heads, width) for p in jnp.split(both, 3, -1))
        q, k = _unit(q) * width**-0.5, _unit(k)
        rate = nn.sigmoid(self.dense(heads, name="rate")(x).astype(jnp.float32))
        step = self.dense(heads, name="step")(x).astype(jnp.float32)
        step = nn.softplus(step + self.param("step_bias", inverse_softplus_of_steps, (heads,)))
        log_decay = -step * jnp.exp(self.param("log_decay", log_uniform_decays, (heads,)))
        y = call.recur(delta_rule_step, delta_rule, q, k, v, log_decay, rate)
        y = Norm(dtype=self.dtype, name="read_norm")(y)
        gate = nn.silu(self.dense(heads, width, name="gate")(x))
        return self.project_out(y * gate, num_in=2)

    @classmethod
    def empty_value(cls, config: TransformerConfig, batch: int) -> dict:
        heads, width = config.num_heads, config.head_width
        return {
            "inputs": jnp.zeros((batch, config.taps - 1, 3 * heads * width)),
            "memory": jnp.zeros((batch, heads, width, width)),
        }

    @classmethod
    def flops(cls, config: TransformerConfig, length: int, layers: int) -> dict[str, float]:
        """`dense` for the projections; `recurrence` as token by token: 8 per key and value."""
        heads, width = config.num_heads, config.head_width
        dense = config.embed_dim * (5 * heads * width + 2 * heads)
        filtered = 6 * config.taps * heads * width
        return {
            "dense": 2 * layers * dense,
            "recurrence": layers * (8 * heads * width**2 + filtered),
        }


def _unit(x: jax.Array) -> jax.Array:
    """Vectors of length 1, float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), -1, keepdims=True) + 1e-6)
