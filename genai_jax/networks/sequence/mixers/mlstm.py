"""The mLSTM of xLSTM: a matrix memory with an exponential input gate (Beck et al. 2024)."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from genai_jax.networks.layers.causal_convolution import CausalConvolution
from genai_jax.networks.layers.dense import Norm
from genai_jax.networks.sequence.config import TransformerConfig
from genai_jax.networks.sequence.mixers.recurrent import Call, Recurrent
from genai_jax.networks.sequence.recurrences.exponential_gate import (
    Memory,
    memory_read,
    memory_step,
)


class Mlstm(Recurrent):
    """`expand` times as wide as the residual stream, in `num_heads` heads.

    Queries and keys come from a short convolution of what values come from.
    """

    EXPAND: ClassVar[float] = 2
    PARTITION_RULES: ClassVar = (
        (r"(in|gate)/kernel", ("embed", "mlp")),
        (r"convolution/kernel", (None, "mlp")),
        (r"convolution/bias", ("mlp",)),
        (r"(query|key|value)/kernel", ("inner", "heads", "head_dim")),
        (r"(input_gate|forget_gate)/kernel", (None, "heads")),
        (r"(input_gate|forget_gate)/bias", ("heads",)),
        (r"read_norm/scale", ("head_dim",)),
        (r"skip", ("mlp",)),
        (r"out/kernel", ("mlp", "embed")),
        (r"out/bias", ("embed",)),
    )

    def mix(self, x: jax.Array, call: Call) -> jax.Array:
        c, width = self.config, self.inner_width(self.config)
        heads, size = c.num_heads, width // c.num_heads
        u, gate = self.dense(width, name="in")(x), self.dense(width, name="gate")(x)
        filtered = nn.silu(call.convolve(CausalConvolution(c.taps, name="convolution"), u))
        q = self.dense(heads, size, name="query")(filtered)
        k = self.dense(heads, size, name="key")(filtered) * size**-0.5
        v = self.dense(heads, size, name="value")(u)
        entry = self.dense(heads, name="input_gate", use_bias=True, init_scale=0.0)(u)
        forget = self.dense(heads, name="forget_gate", use_bias=True, init_scale=0.0)(u)
        # Heads begin with different memories: forget gates of sigmoid(3) to sigmoid(6).
        log_forget = nn.log_sigmoid(forget.astype(jnp.float32) + jnp.linspace(3.0, 6.0, heads))
        y = call.recur(memory_step, memory_read, q, k, v, entry.astype(jnp.float32), log_forget)
        y = Norm(dtype=self.dtype, name="read_norm")(y).reshape(u.shape)
        skip = self.param("skip", nn.initializers.ones, (width,), jnp.float32)
        y = y + (skip * filtered).astype(self.dtype)
        return self.project_out(y * nn.silu(gate))

    @classmethod
    def empty_value(cls, config: TransformerConfig, batch: int) -> dict:
        heads, width = config.num_heads, cls.inner_width(config)
        size = width // heads
        return {
            "inputs": jnp.zeros((batch, config.taps - 1, width)),
            "memory": Memory.empty(batch, heads, size, size),
        }

    @classmethod
    def flops(cls, config: TransformerConfig, length: int, layers: int) -> dict[str, float]:
        """`dense` for the projections; `recurrence` as token by token: 6 per key and value."""
        heads, width = config.num_heads, cls.inner_width(config)
        dense = 3 * config.embed_dim * width + 3 * width**2 + 2 * width * heads
        return {
            "dense": 2 * layers * dense,
            "recurrence": layers * width * (6 * width // heads + 2 * config.taps),
        }
