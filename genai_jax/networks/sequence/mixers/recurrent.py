"""What recurrent mixers share: how a call with a state, and one without, run a recurrence."""

from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from genai_jax.config import ConfigError
from genai_jax.networks.layers.causal_convolution import (
    CausalConvolution,
    inputs_after,
    inputs_after_each,
)
from genai_jax.networks.layers.dense import Dense
from genai_jax.networks.parallel.axes import SEQUENCE, ParallelConfig, axis_size, describe_axis
from genai_jax.networks.sequence.config import TransformerConfig
from genai_jax.networks.sequence.mixers.protocol import TokenContext
from genai_jax.networks.sequence.recurrences.boundaries import Boundaries, boundaries
from genai_jax.networks.sequence.recurrences.loop import loop
from genai_jax.networks.sequence.state import RecurrentState

PyTree = Any


class Recurrent(nn.Module):
    """Base of the recurrent mixers; see `protocol.Mixer`.

    A subclass has `empty_value`, and `mix`, which calls `Call.recur` once, after `Call.convolve`
    if it begins with a short convolution. A state's value is a dictionary: "inputs", what the
    convolution remembers, and "memory", the state of the recurrence.
    """

    config: TransformerConfig
    backend: str = "auto"
    dtype: jnp.dtype = jnp.float32
    parallel: ParallelConfig = ParallelConfig()

    PARTITION_RULES: ClassVar[tuple] = ()
    EXPAND: ClassVar[float] = 1  # inner width relative to the residual stream, if not set

    @nn.compact
    def __call__(
        self, x: jax.Array, context: TokenContext, state: RecurrentState | None = None
    ) -> tuple[jax.Array, RecurrentState | None]:
        if axis_size(SEQUENCE) > 1 and not self.is_initializing():
            raise ConfigError(
                f"{describe_axis(SEQUENCE)}: the recurrent mixer {self.name} needs whole sequences "
                "on a device; use the mesh axes `data`, `fsdp`, and `tensor`"
            )
        call = Call(self.empty_value(self.config, x.shape[0]), context, state)
        y = self.mix(x, call)
        return y, call.new_state()

    def mix(self, x: jax.Array, call: "Call") -> jax.Array:
        """[batch, length, embed] -> the same shape."""
        raise NotImplementedError

    @classmethod
    def inner_width(cls, config: TransformerConfig) -> int:
        return round(config.embed_dim * (config.expand or cls.EXPAND))

    @classmethod
    def empty_value(cls, config: TransformerConfig, batch: int) -> dict[str, PyTree]:
        """The value of the state before the first token, arrays [batch, ...]."""
        raise NotImplementedError

    @classmethod
    def empty_state(
        cls, config: TransformerConfig, batch: int, max_length: int, dtype, rewind: int = 0
    ) -> RecurrentState:
        """A state of constant size, in float32."""
        del max_length, dtype
        return RecurrentState.empty(cls.empty_value(config, batch), rewind)

    def dense(self, *shape: int, name: str, **options) -> Dense:
        return Dense(shape, dtype=self.dtype, name=name, **options)

    def project_out(self, y: jax.Array, num_in: int = 1) -> jax.Array:
        """[batch, length, ...] -> [batch, length, embed_dim], as small as the depth requires."""
        scale = 1 / (2 * self.config.num_layers)
        return self.dense(
            self.config.embed_dim, name="out", num_in=num_in, init_scale=scale,
            use_bias=self.config.use_bias,
        )(y.astype(self.dtype))  # fmt: skip


class Call:
    """One call of a mixer: where its recurrence begins, and what is left at its end."""

    def __init__(self, empty: dict, context: TokenContext, state: RecurrentState | None):
        self.context, self.state, self.empty = context, state, empty
        self.bounds: Boundaries = boundaries(context, continued=state is not None)
        self.value = empty if state is None else state.value
        self.after: dict[str, PyTree] = {}

    @property
    def segments(self) -> jax.Array | None:
        """Segment ids [batch, length], 0 for padding, also of tokens that continue a state."""
        if self.state is None:
            return self.context.segment_ids
        return None if self.bounds.real is None else self.bounds.real.astype(jnp.int32)

    def convolve(self, layer: CausalConvolution, x: jax.Array) -> jax.Array:
        """Applies a convolution, whose last inputs are part of the state."""
        if self.state is None:
            return layer(x, self.context.segment_ids)
        before = self.value["inputs"]
        if self.state.keeps_past:
            self.after["inputs"] = inputs_after_each(x, before)
        else:
            self.after["inputs"] = inputs_after(x, before, self.context.lengths)
        return layer(x, before=before)

    def recur(self, step: Callable, parallel: Callable | None, *inputs: jax.Array) -> jax.Array:
        """The outputs of a recurrence, [batch, length, ...].

        Args:
          step: one token of each row, as `loop` takes it.
          parallel: all tokens, from (*inputs, state, bounds) to (outputs, final state); None for a
            recurrence that can only be computed token by token.
          inputs: arrays [batch, length, ...].
        """
        memory, keeps_past = self.value["memory"], bool(self.state and self.state.keeps_past)
        one_token = self.state is not None and inputs[0].shape[1] == 1
        if parallel is None or keeps_past or one_token:
            tree = inputs[0] if len(inputs) == 1 else inputs
            y, after = loop(
                step, tree, memory, self.bounds, fresh=self.empty["memory"], every=keeps_past
            )
        else:
            y, after = parallel(*inputs, memory, self.bounds)
        self.after["memory"] = after
        return y

    def new_state(self) -> RecurrentState | None:
        if self.state is None:
            return None
        if self.state.keeps_past:
            return self.state.advance(self.after, self.context.lengths)
        new = self.context.positions.shape[1]
        lengths = self.context.lengths if self.context.lengths is not None else new
        return self.state.finish(self.after, lengths)
