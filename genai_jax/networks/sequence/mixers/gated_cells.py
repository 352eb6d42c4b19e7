"""Recurrent cells with gates: LSTM, GRU, minimal GRU, and a liquid cell."""

from collections.abc import Callable
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from genai_jax.networks.sequence.config import TransformerConfig
from genai_jax.networks.sequence.mixers.recurrent import Call, Recurrent
from genai_jax.networks.sequence.recurrences.diagonal import linear_recurrence, linear_step


class _Cell(Recurrent):
    """A cell whose `gates` see the input and, but for the minimal GRU, the hidden state.

    `expand` times as wide as the residual stream. The state is float32, as are the products with
    it: they are the recurrence.
    """

    PARTITION_RULES: ClassVar = (
        (r"in/kernel", ("embed", None, "mlp")),
        (r"in/bias", (None, "mlp")),
        (r"recurrent", (None, None, "mlp")),
        (r"out/kernel", ("mlp", "embed")),
        (r"out/bias", ("embed",)),
    )
    gates: ClassVar[int]

    def inputs(self, x: jax.Array) -> jax.Array:
        """What the input adds to each gate, [batch, length, gates, width], float32."""
        y = self.dense(self.gates, self.inner_width(self.config), name="in", use_bias=True)(x)
        return y.astype(jnp.float32)

    def recurrent_kernel(self) -> jax.Array:
        return recurrent_kernel(self, self.inner_width(self.config), self.gates)

    @staticmethod
    def zeros(batch: int, width: int) -> jax.Array | tuple:
        """The state of the cell before the first token."""
        return jnp.zeros((batch, width))

    @classmethod
    def empty_value(cls, config: TransformerConfig, batch: int) -> dict:
        return {"memory": cls.zeros(batch, cls.inner_width(config))}

    @classmethod
    def flops(cls, config: TransformerConfig, length: int, layers: int) -> dict[str, float]:
        """`dense` for the projections; `recurrence` for the products with the state."""
        width = cls.inner_width(config)
        return {
            "dense": 2 * layers * config.embed_dim * width * (cls.gates + 1),
            "recurrence": 2 * layers * cls.gates * width**2,
        }


class Lstm(_Cell):
    """Long short-term memory (Hochreiter and Schmidhuber 1997; forget gate: Gers et al. 2000)."""

    gates: ClassVar[int] = 4

    def mix(self, x: jax.Array, call: Call) -> jax.Array:
        step = lstm_step(self.recurrent_kernel())
        return self.project_out(call.recur(step, None, self.inputs(x)))

    @staticmethod
    def zeros(batch: int, width: int) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros((batch, width)), jnp.zeros((batch, width))


class Gru(_Cell):
    """Gated recurrent unit (Cho et al. 2014), with the reset gate after the product."""

    gates: ClassVar[int] = 3

    def mix(self, x: jax.Array, call: Call) -> jax.Array:
        step = gru_step(self.recurrent_kernel())
        return self.project_out(call.recur(step, None, self.inputs(x)))


def recurrent_kernel(module: nn.Module, width: int, gates: int) -> jax.Array:
    """The parameter [width, gates, width] of a module; orthogonal for each gate at the start."""

    def init(key, shape):
        keys = jax.random.split(key, gates)
        square = nn.initializers.orthogonal()
        return jnp.stack([square(k, (width, width)) for k in keys], 1).astype(jnp.float32)

    return module.param("recurrent", init, (width, gates, width))


def lstm_step(kernel: jax.Array) -> Callable:
    """One token: ((cell, hidden), input [batch, 4, width]) -> (the same, hidden)."""

    def step(state, u):
        cell, hidden = state
        u = u + jnp.einsum("bh,hgw->bgw", hidden, kernel)
        # The forget gate begins open: its bias is 1 more than the others.
        cell = nn.sigmoid(u[:, 1] + 1) * cell + nn.sigmoid(u[:, 0]) * jnp.tanh(u[:, 2])
        hidden = nn.sigmoid(u[:, 3]) * jnp.tanh(cell)
        return (cell, hidden), hidden

    return step


def gru_step(kernel: jax.Array) -> Callable:
    """One token: (hidden, input [batch, 3, width]) -> (hidden, hidden)."""

    def step(hidden, u):
        recurrent = jnp.einsum("bh,hgw->bgw", hidden, kernel)
        update, reset = (
            nn.sigmoid(u[:, 0] + recurrent[:, 0]),
            nn.sigmoid(u[:, 1] + recurrent[:, 1]),
        )
        new = jnp.tanh(u[:, 2] + reset * recurrent[:, 2])
        hidden = (1 - update) * new + update * hidden
        return hidden, hidden

    return step


# Cells that can be advanced outside a mixer: the mixer, and kernel -> step.
CELLS = {"gru": (Gru, gru_step), "lstm": (Lstm, lstm_step)}


class MinimalGru(_Cell):
    """A GRU whose gates see only the input, so that it is a parallel scan (Feng et al. 2024)."""

    gates: ClassVar[int] = 2

    def mix(self, x: jax.Array, call: Call) -> jax.Array:
        u = self.inputs(x)
        update = nn.sigmoid(u[:, :, 0])
        y = call.recur(linear_step, linear_recurrence, 1 - update, update * u[:, :, 1])
        return self.project_out(y)

    @classmethod
    def flops(cls, config: TransformerConfig, length: int, layers: int) -> dict[str, float]:
        width = cls.inner_width(config)
        dense = 2 * layers * config.embed_dim * width * (cls.gates + 1)
        return {"dense": dense, "recurrence": 3 * layers * width}


class Liquid(_Cell):
    """The closed-form continuous-time cell (Hasani et al. 2022, equation 10).

    A gate that depends on the elapsed time, one unit per token, mixes two candidates for the state.
    Time constant and offset are linear in input and state: with a time of 1 only their sum counts.
    """

    gates: ClassVar[int] = 4

    def mix(self, x: jax.Array, call: Call) -> jax.Array:
        kernel = self.recurrent_kernel()

        def step(hidden, u):
            u = u + jnp.einsum("bh,hgw->bgw", hidden, kernel)
            share = nn.sigmoid(u[:, 2] + u[:, 3])  # time constant x elapsed time + offset
            hidden = jnp.tanh(u[:, 0]) * (1 - share) + jnp.tanh(u[:, 1]) * share
            return hidden, hidden

        return self.project_out(call.recur(step, None, self.inputs(x)))
