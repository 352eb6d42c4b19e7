"""Mamba-2: a selective state-space model with one decay per head (Dao and Gu 2024)."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from genai_jax.networks.layers.causal_convolution import CausalConvolution
from genai_jax.networks.layers.dense import Norm
from genai_jax.networks.sequence.config import TransformerConfig
from genai_jax.networks.sequence.mixers.mamba import inverse_softplus_of_steps
from genai_jax.networks.sequence.mixers.recurrent import Call, Recurrent
from genai_jax.networks.sequence.recurrences.linear_attention import (
    linear_attention,
    linear_attention_step,
)

STATES = 64


def log_uniform_decays(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32):
    """The logarithm of -A, uniform between 1 and 16."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 1.0, 16.0))


class Mamba2(Recurrent):
    """State-space duality: linear attention whose queries and keys all heads share.

    `expand` times as wide as the residual stream, in `num_heads` heads of `state_dim` states.
    """

    EXPAND: ClassVar[float] = 2
    PARTITION_RULES: ClassVar = (
        (r"(in|gate)/kernel", ("embed", "heads", "head_dim")),
        (r"convolution/kernel", (None, None)),
        (r"convolution/bias", (None,)),
        (r"states/kernel", ("embed", None)),
        (r"step/kernel", ("embed", "heads")),
        (r"(step_bias|skip|log_decay)", ("heads",)),
        (r"norm/scale", ("mlp",)),
        (r"out/kernel", ("mlp", "embed")),
        (r"out/bias", ("embed",)),
    )

    def mix(self, x: jax.Array, call: Call) -> jax.Array:
        c = self.config
        heads, width, states = c.num_heads, self.inner_width(c), c.state_dim or STATES
        rows = x.shape[:2]
        u = self.dense(heads, width // heads, name="in")(x).reshape(*rows, width)
        gate = self.dense(heads, width // heads, name="gate")(x).reshape(*rows, width)
        both = jnp.concatenate([u, self.dense(2 * states, name="states")(x)], -1)
        both = nn.silu(call.convolve(CausalConvolution(c.taps, name="convolution"), both))
        u, b, read = jnp.split(both, [width, width + states], -1)
        step = self.dense(heads, name="step")(x).astype(jnp.float32)
        step = nn.softplus(step + self.param("step_bias", inverse_softplus_of_steps, (heads,)))
        log_decay = -step * jnp.exp(self.param("log_decay", log_uniform_decays, (heads,)))
        values = u.reshape(*rows, heads, width // heads).astype(jnp.float32)
        # Copied in float32, in which the gradients of the copies are then summed.
        wide = lambda a: a.astype(jnp.float32)[:, :, None]
        shared = lambda a: jnp.broadcast_to(wide(a), (*rows, heads, states))
        y = call.recur(
            linear_attention_step, linear_attention,
            shared(read), shared(b), values * step[..., None], log_decay,
        )  # fmt: skip
        y = y + self.param("skip", nn.initializers.ones, (heads,), jnp.float32)[:, None] * values
        y = y.reshape(*rows, width).astype(self.dtype) * nn.silu(gate)
        return self.project_out(Norm(dtype=self.dtype, name="norm")(y))

    @classmethod
    def empty_value(cls, config: TransformerConfig, batch: int) -> dict:
        heads, width, states = config.num_heads, cls.inner_width(config), config.state_dim or STATES
        return {
            "inputs": jnp.zeros((batch, config.taps - 1, width + 2 * states)),
            "memory": jnp.zeros((batch, heads, states, width // heads)),
        }

    @classmethod
    def flops(cls, config: TransformerConfig, length: int, layers: int) -> dict[str, float]:
        """`dense` for the projections; `recurrence` as token by token: 6 per channel and state."""
        width, states = cls.inner_width(config), config.state_dim or STATES
        dense = config.embed_dim * (3 * width + 2 * states + config.num_heads)
        filtered = 2 * config.taps * (width + 2 * states)
        return {
            "dense": 2 * layers * dense,
            "recurrence": layers * (6 * width * states + filtered),
        }
