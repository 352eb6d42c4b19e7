"""Mamba: a selective state-space model (Gu and Dao 2023)."""

import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

import kernels_pallas
from genai_jax.networks.layers.causal_convolution import CausalConvolution
from genai_jax.networks.sequence.config import TransformerConfig
from genai_jax.networks.sequence.mixers.recurrent import Call, Recurrent
from genai_jax.networks.sequence.recurrences.boundaries import Boundaries

STEP = (1e-3, 1e-1)  # step sizes at the start are log-uniform between these


def inverse_softplus_of_steps(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32):
    """A bias whose softplus is log-uniform between the sizes of `STEP`."""
    low, high = (math.log(size) for size in STEP)
    step = jnp.exp(jax.random.uniform(key, shape, dtype, low, high))
    return step + jnp.log(-jnp.expm1(-step))


def negative_integers(key: jax.Array, shape: tuple[int, int], dtype=jnp.float32):
    """log(1 .. state) for every channel: S4D-Real, as the logarithm of -A."""
    del key
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1, dtype=dtype)), shape)


class Mamba(Recurrent):
    """A gated block: a short convolution, then a diagonal recurrence chosen by its input.

    `expand` times as wide as the residual stream, with `state_dim` states per channel.
    """

    EXPAND: ClassVar[float] = 2
    PARTITION_RULES: ClassVar = (
        (r"(in|gate)/kernel", ("embed", "mlp")),
        (r"convolution/kernel", (None, "mlp")),
        (r"convolution/bias", ("mlp",)),
        (r"(step_in|states)/kernel", ("mlp", None)),
        (r"step/kernel", (None, "mlp")),
        (r"(step_bias|skip)", ("mlp",)),
        (r"log_decay", ("mlp", "state")),
        (r"out/kernel", ("mlp", "embed")),
        (r"out/bias", ("embed",)),
    )

    def mix(self, x: jax.Array, call: Call) -> jax.Array:
        c, width = self.config, self.inner_width(self.config)
        states = c.state_dim or 16
        u = self.dense(width, name="in")(x)
        gate = self.dense(width, name="gate")(x)
        u = nn.silu(call.convolve(CausalConvolution(c.taps, name="convolution"), u))
        step = self.dense(_rank(c), name="step_in")(u)
        b, read = jnp.split(self.dense(2 * states, name="states")(u), 2, -1)
        step = self.dense(width, name="step")(step).astype(jnp.float32)
        step = nn.softplus(step + self.param("step_bias", inverse_softplus_of_steps, (width,)))
        a = -jnp.exp(self.param("log_decay", negative_integers, (width, states)))
        skip = self.param("skip", nn.initializers.ones, (width,), jnp.float32)
        scan = kernels_pallas.selective_scan

        def parallel(u, step, b, read, state, bounds: Boundaries):
            return scan(u, step, a, b, read, skip, initial_state=state, segment_ids=call.segments)

        def one(state, token):
            u, step, b, read = (v.astype(jnp.float32) for v in token)
            new = (step * u)[..., None] * b[:, None]
            state = jnp.exp(step[..., None] * a) * state + new
            return state, jnp.sum(state * read[:, None], -1) + skip * u

        y = call.recur(one, parallel, u, step, b, read)
        return self.project_out(y.astype(self.dtype) * nn.silu(gate))

    @classmethod
    def empty_value(cls, config: TransformerConfig, batch: int) -> dict:
        width = cls.inner_width(config)
        return {
            "inputs": jnp.zeros((batch, config.taps - 1, width)),
            "memory": jnp.zeros((batch, width, config.state_dim or 16)),
        }

    @classmethod
    def flops(cls, config: TransformerConfig, length: int, layers: int) -> dict[str, float]:
        """`dense` for the projections; `recurrence` for the scan: 6 per channel and state."""
        width, states = cls.inner_width(config), config.state_dim or 16
        rank = _rank(config)
        dense = 3 * config.embed_dim * width + width * (2 * rank + 2 * states)
        return {
            "dense": 2 * layers * dense,
            "recurrence": layers * width * (6 * states + 2 * config.taps),
        }


def _rank(config: TransformerConfig) -> int:
    return -(-config.embed_dim // 16)
