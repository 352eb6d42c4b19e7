"""The smallest recurrent mixer, from outside the package: h_t = a h_{t-1} + b x_t."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from genai_jax.networks.parallel.axes import ParallelConfig
from genai_jax.networks.sequence.config import TransformerConfig
from genai_jax.networks.sequence.mixers.protocol import TokenContext
from genai_jax.networks.sequence.state import RecurrentState

NAME = f"{__name__}:LinearRecurrence"


class LinearRecurrence(nn.Module):
    """See `genai_jax.networks.sequence.mixers.protocol.Mixer`. The output of token t is h_t."""

    config: TransformerConfig
    backend: str = "auto"
    dtype: jnp.dtype = jnp.float32
    parallel: ParallelConfig = ParallelConfig()

    PARTITION_RULES: ClassVar = ((r"decay", ("embed",)), (r"gain", ("embed",)))

    @nn.compact
    def __call__(self, x: jax.Array, context: TokenContext, state: RecurrentState | None = None):
        init = nn.initializers.normal(0.5)
        decay = jax.nn.sigmoid(self.param("decay", init, x.shape[-1:], jnp.float32))
        gain = self.param("gain", init, x.shape[-1:], jnp.float32)
        begin = jnp.zeros_like(x[:, 0], jnp.float32) if state is None else state.value
        continues = jnp.ones(x.shape[:2], bool)
        if state is None and context.segment_ids is not None:
            ids = context.segment_ids
            continues = jnp.concatenate([continues[:, :1], ids[:, 1:] == ids[:, :-1]], 1)

        def step(h, inputs):
            x, continues = inputs
            h = decay * h * continues[:, None] + gain * x
            return h, h

        _, after = jax.lax.scan(step, begin, (x.swapaxes(0, 1), continues.swapaxes(0, 1)))
        after = after.swapaxes(0, 1)
        if state is not None:
            state = state.advance(after, context.lengths)
        return after.astype(x.dtype), state

    @staticmethod
    def empty_state(config, batch: int, max_length: int, dtype, rewind: int = 0) -> RecurrentState:
        del max_length, dtype  # a state of constant size, in float32
        return RecurrentState.empty(jnp.zeros((batch, config.embed_dim)), rewind)

    @staticmethod
    def flops(config, length: int, layers: int) -> dict[str, float]:
        return {"recurrence": 4 * layers * config.embed_dim}
