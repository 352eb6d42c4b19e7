"""What a mixer is: its call, its decoding state, and what must be known about it beforehand."""

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp

import kernels_pallas
from genai_jax.networks.layers.positions import Rotation
from genai_jax.networks.layers.relative_positions import RelativeBias


class Encoded(NamedTuple):
    """What an encoder has read; a pytree.

    Attributes:
      hidden: [batch, source_length, embed_dim]; None where the decoder has kept keys and values.
      segment_ids: [batch, source_length]; a token sees the sources of its own segment, and 0 is
        padding. While decoding, each row is one segment, 1.
    """

    hidden: jax.Array | None
    segment_ids: jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["positions", "segment_ids", "lengths", "rotation", "relative", "source"],
    meta_fields=["mask"],
)
@dataclasses.dataclass(frozen=True)
class TokenContext:
    """What every block of a stack knows about its tokens; a pytree whose mask is static.

    Attributes:
      positions: [batch, length] integers.
      segment_ids: [batch, length] integers; a token depends only on tokens of its own segment, and
        segment 0 is padding. None: one segment, all real.
      lengths: [batch] number of real tokens among those of a row, which come first; the others are
        padding and must not enter a state. None: all are real.
      mask: which tokens a token may see; None for the mixer's default, which is causal.
      rotation: rotary angles of the positions, for mixers that rotate.
      relative: biases of attention scores by relative position, if the network learns them.
      source: what an encoder has read, for blocks with cross-attention.
    """

    positions: jax.Array
    segment_ids: jax.Array | None = None
    lengths: jax.Array | None = None
    mask: kernels_pallas.Mask | None = None
    rotation: Rotation | None = None
    relative: RelativeBias | None = None
    source: Encoded | None = None

    @property
    def real(self) -> jax.Array | None:
        """[batch, length] bool, False for padding; None if there is none."""
        real = None if self.segment_ids is None else self.segment_ids != 0
        if self.lengths is not None:
            within = jnp.arange(self.positions.shape[1]) < self.lengths[:, None]
            real = within if real is None else real & within
        return real


class State(Protocol):
    """What a mixer remembers of the tokens of each row; a pytree of arrays [batch, ...]."""

    def select(self, rows: jax.Array) -> "State":
        """The state of rows [new_batch], in that order; a row may come several times (beams)."""

    def rewind(self, lengths: jax.Array) -> "State":
        """The state after only the first lengths [batch] tokens of each row (speculation).

        Raises:
          ValueError: a state that keeps no past.
        """


class Mixer(Protocol):
    """A Flax module that mixes tokens: [batch, length, embed] -> the same shape.

    Its constructor takes the keywords config, backend, dtype, parallel and name: the network's
    `TransformerConfig`, the backend of `kernels_pallas`, the dtype of matmuls, and the
    `ParallelConfig`. Tokens come in the order of `parallel.axes.token_order`.
    """

    # Parameter path below the mixer -> logical axes of one layer. The first match decides.
    PARTITION_RULES: ClassVar[tuple[tuple[str, tuple], ...]]

    def __call__(
        self, x: jax.Array, context: TokenContext, state: State | None = None
    ) -> tuple[jax.Array, State | None]:
        """The mixed tokens, and the state with the real ones among them added.

        Without a state nothing came before these tokens, and none is returned. With one the tokens
        continue each row, `context.positions[:, 0]` saying where, and segments are not used.
        """

    @staticmethod
    def empty_state(config: Any, batch: int, max_length: int, dtype: Any, rewind: int = 0) -> State:
        """The state of one layer before the first token, for rows of up to max_length tokens.

        rewind: how many tokens it must be possible to take back.
        """

    @staticmethod
    def flops(config: Any, length: int, layers: int) -> dict[str, float]:
        """Forward FLOPs of `layers` layers per token of a row of `length` tokens, by part."""
