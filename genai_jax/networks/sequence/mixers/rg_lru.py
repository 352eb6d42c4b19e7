"""The recurrent block of Griffin: a real-gated linear recurrent unit (De et al. 2024)."""

import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from genai_jax.networks.layers.causal_convolution import CausalConvolution
from genai_jax.networks.sequence.config import TransformerConfig
from genai_jax.networks.sequence.mixers.recurrent import Call, Recurrent
from genai_jax.networks.sequence.recurrences.diagonal import linear_recurrence, linear_step

POWER = 8.0  # the constant c of the decay a^(c r)
RADIUS = (0.9, 0.999)  # of a^c at the start


def decays_in_ring(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32):
    """A parameter whose sigmoid a has a^c uniform between the radii."""
    a = jax.random.uniform(key, shape, dtype, *RADIUS) ** (1 / POWER)
    return jnp.log(a) - jnp.log1p(-a)


class RgLru(Recurrent):
    """A convolution and a gated diagonal recurrence, multiplied by a GeLU branch.

    The gates are block-diagonal with `num_heads` blocks. `expand` times as wide as the residual
    stream.
    """

    PARTITION_RULES: ClassVar = (
        (r"(in|branch)/kernel", ("embed", "mlp")),
        (r"convolution/kernel", (None, "mlp")),
        (r"convolution/bias", ("mlp",)),
        (r"(recurrence|input)_gate", ("heads", None, None)),
        (r"(recurrence|input)_bias", ("heads", "head_dim")),
        (r"decay", ("mlp",)),
        (r"out/kernel", ("mlp", "embed")),
        (r"out/bias", ("embed",)),
    )

    def mix(self, x: jax.Array, call: Call) -> jax.Array:
        c, width = self.config, self.inner_width(self.config)
        branch = nn.gelu(self.dense(width, name="branch")(x))
        u = self.dense(width, name="in")(x)
        u = call.convolve(CausalConvolution(c.taps, name="convolution"), u)
        rate, entry = self._gate(u, "recurrence"), self._gate(u, "input")
        logits = self.param("decay", decays_in_ring, (width,))
        log_decay = POWER * rate * nn.log_sigmoid(logits)  # equations 3 and 4
        scale = jnp.sqrt(-jnp.expm1(2 * log_decay))
        new = scale * entry * u.astype(jnp.float32)
        y = call.recur(linear_step, linear_recurrence, jnp.exp(log_decay), new)
        return self.project_out(y.astype(self.dtype) * branch)

    def _gate(self, u: jax.Array, name: str) -> jax.Array:
        """A sigmoid of a block-diagonal map, float32."""
        heads, size = self.config.num_heads, u.shape[-1] // self.config.num_heads
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=1, out_axis=2,
                                                batch_axis=0)  # fmt: skip
        kernel = self.param(f"{name}_gate", init, (heads, size, size), jnp.float32)
        bias = self.param(f"{name}_bias", nn.initializers.zeros, (heads, size), jnp.float32)
        blocks = u.reshape(*u.shape[:2], heads, size)
        y = jnp.einsum("blhi,hij->blhj", blocks, kernel.astype(self.dtype))
        return nn.sigmoid(y.astype(jnp.float32) + bias).reshape(u.shape)

    @classmethod
    def empty_value(cls, config: TransformerConfig, batch: int) -> dict:
        width = cls.inner_width(config)
        return {
            "inputs": jnp.zeros((batch, config.taps - 1, width)),
            "memory": jnp.zeros((batch, width)),
        }

    @classmethod
    def flops(cls, config: TransformerConfig, length: int, layers: int) -> dict[str, float]:
        """`dense` for the projections and gates; `recurrence` for the convolution and the scan."""
        width = cls.inner_width(config)
        dense = 3 * config.embed_dim * width + 2 * width * math.ceil(width / config.num_heads)
        return {
            "dense": 2 * layers * dense,
            "recurrence": layers * width * (3 + 2 * config.taps),
        }
