"""Structured state spaces: S4 (Gu et al. 2022a) and S4D (Gu et al. 2022b)."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from genai_jax.networks.sequence.config import TransformerConfig
from genai_jax.networks.sequence.mixers.mamba import STEP
from genai_jax.networks.sequence.mixers.recurrent import Call, Recurrent
from genai_jax.networks.sequence.recurrences.boundaries import Boundaries
from genai_jax.networks.sequence.recurrences.state_space import (
    diagonal_system,
    low_rank_response,
    low_rank_system,
    normal_plus_low_rank,
)
from genai_jax.networks.sequence.recurrences.time_invariant import (
    System,
    by_chunks,
    convolution,
    impulse_response,
    system_step,
    to_complex,
)

STATES = 64


def log_uniform_steps(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32):
    """The logarithm of step sizes that are log-uniform between those of `STEP`."""
    low, high = np.log(STEP)
    return jax.random.uniform(key, shape, dtype, low, high)


class S4d(Recurrent):
    """A diagonal state space per channel, the same at all times, and a gated output.

    `state_dim` states per channel, half of which are stored: the others are their conjugates.
    """

    PARTITION_RULES: ClassVar = (
        (r"(log_step|skip)", ("embed",)),
        (r"(decay|frequency)", ("embed", "state")),
        (r"(read|low_rank|entry)", ("embed", "state", None)),
        (r"(out|gate)/kernel", ("embed", "mlp")),
        (r"(out|gate)/bias", ("mlp",)),
    )

    def system(self, channels: int) -> tuple[System, dict]:
        """The system in discrete time, and what `response` needs besides."""
        shape = (channels, max(1, (self.config.state_dim or STATES) // 2))
        log_step = self.param("log_step", log_uniform_steps, (channels,))
        decay = self.param("decay", lambda key, shape: jnp.full(shape, np.log(0.5)), shape)
        frequencies = lambda key, shape: jnp.broadcast_to(np.pi * jnp.arange(shape[1]), shape)
        frequency = self.param("frequency", frequencies, shape)  # S4D-Lin
        a = jax.lax.complex(-jnp.exp(decay), frequency.astype(jnp.float32))
        return diagonal_system(log_step, a, self.complex_param("read", shape)), {}

    def response(self, system: System, parts: dict, length: int) -> jax.Array:
        return impulse_response(system, length)

    def complex_param(self, name: str, shape: tuple[int, ...]) -> jax.Array:
        """Complex numbers of variance 1, stored as real and imaginary parts."""
        init = nn.initializers.normal(np.sqrt(0.5))
        return to_complex(self.param(name, init, (*shape, 2), jnp.float32))

    def mix(self, x: jax.Array, call: Call) -> jax.Array:
        channels = x.shape[-1]
        system, parts = self.system(channels)
        u = x.astype(jnp.float32)

        def parallel(u, state, bounds: Boundaries):
            if bounds.real is None:  # one document in each row
                return convolution(u, self.response(system, parts, u.shape[1])), state
            return by_chunks(system, u, bounds), state

        # A state at the end of many tokens comes from the recurrence.
        y = call.recur(system_step(system), parallel if call.state is None else None, u)
        y = y + self.param("skip", nn.initializers.ones, (channels,), jnp.float32) * u
        y = nn.gelu(y).astype(self.dtype)
        gate = nn.sigmoid(self.dense(channels, name="gate", use_bias=True)(y))
        scale = 1 / (2 * self.config.num_layers)
        return self.dense(channels, name="out", init_scale=scale, use_bias=True)(y) * gate

    @classmethod
    def empty_value(cls, config: TransformerConfig, batch: int) -> dict:
        states = max(1, (config.state_dim or STATES) // 2)
        return {"memory": jnp.zeros((batch, config.embed_dim, states, 2))}

    @classmethod
    def flops(cls, config: TransformerConfig, length: int, layers: int) -> dict[str, float]:
        """`dense` for the output; `recurrence` as token by token: 8 per channel and state."""
        states = cls.empty_value(config, 1)["memory"].shape[2]
        return {
            "dense": 4 * layers * config.embed_dim**2,
            "recurrence": 16 * layers * config.embed_dim * states,
        }


class S4(S4d):
    """HiPPO-LegS as a normal matrix plus one of rank one; `state_dim` complex states per channel.

    Without padding and document boundaries, its kernel comes from Cauchy sums; otherwise from the
    powers of the dense matrix, chunk by chunk.
    """

    def system(self, channels: int) -> tuple[System, dict]:
        size = self.config.state_dim or STATES
        start = normal_plus_low_rank(size)
        shape = (channels, size)
        log_step = self.param("log_step", log_uniform_steps, (channels,))
        copies = lambda v: lambda key, shape: jnp.broadcast_to(jnp.float32(v), shape)
        parts = lambda v: copies(np.stack([v.real, v.imag], -1))
        decay = self.param("decay", copies(np.log(-start.values.real)), shape)
        frequency = self.param("frequency", copies(start.values.imag), shape)
        values = jax.lax.complex(-jnp.exp(decay), frequency)
        p = to_complex(self.param("low_rank", parts(start.p + 0j), (*shape, 2)))
        b = to_complex(self.param("entry", parts(start.b + 0j), (*shape, 2)))
        c = self.complex_param("read", shape)
        system = low_rank_system(log_step, values, p, b, c)
        return system, dict(log_step=log_step, values=values, p=p, b=b, c=c)

    def response(self, system: System, parts: dict, length: int) -> jax.Array:
        return low_rank_response(**parts, length=length, discrete=system.a)

    @classmethod
    def empty_value(cls, config: TransformerConfig, batch: int) -> dict:
        return {"memory": jnp.zeros((batch, config.embed_dim, config.state_dim or STATES, 2))}
