"""A recurrent encoder-decoder with additive attention (Bahdanau, Cho, Bengio 2015).

The encoder reads the source in both directions. Before each token the decoder weighs what was read
by a score of its own state and of each token of the source, score(s, h) = v . tanh(W s + U h), and
reads the weighted mean (section 3.1). Unlike theirs, its first state is zero, and a layer with tanh
instead of maxout leads to the logits.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from genai_jax.config import field
from genai_jax.networks.layers.dense import Dense, Norm
from genai_jax.networks.layers.embedding import Embed
from genai_jax.networks.sequence.config import TransformerConfig
from genai_jax.networks.sequence.head import Head, output_logits
from genai_jax.networks.sequence.mixers.gated_cells import CELLS, Gru, recurrent_kernel
from genai_jax.networks.sequence.mixers.protocol import Encoded, TokenContext
from genai_jax.networks.sequence.recurrences.boundaries import boundaries
from genai_jax.networks.sequence.recurrences.loop import loop


@dataclasses.dataclass(frozen=True)
class RecurrentConfig:
    """Shapes of a recurrent encoder-decoder."""

    cell: str = field("gru", "Recurrent cell of encoder and decoder.", choices=tuple(CELLS))
    embed_dim: int = field(128, "Width of embeddings and annotations.", minimum=1)
    hidden_dim: int = field(256, "Width of the recurrent states.", minimum=1)
    attention_dim: int = field(128, "Width of the layer that scores source tokens.", minimum=1)
    dropout: float = field(
        0.0, "Dropout rate of embeddings and of what leads to the logits.", minimum=0, maximum=1
    )


class Reading(NamedTuple):
    """The decoding state: what was read of the source, and the state of the cell.

    Attributes:
      annotations: [batch, source_length, 2 embed_dim], float32.
      keys: U h, [batch, source_length, attention_dim], float32.
      memory: of the cell, arrays [batch, hidden_dim].
    """

    annotations: jax.Array
    keys: jax.Array
    memory: jax.Array | tuple

    def select(self, rows: jax.Array) -> "Reading":
        """The state of rows [new_batch], in that order."""
        return jax.tree.map(lambda a: a[rows], self)


class RecurrentEncoderDecoder(nn.Module):
    """Sources and targets in, logits out; the methods are those of `EncoderDecoder`."""

    config: RecurrentConfig
    vocab_size: int
    dtype: jnp.dtype = jnp.float32

    PARTITION_RULES: ClassVar = (
        (r"embed/embedding", ("vocabulary", "embed")),
        (r"embed_norm/scale", ("embed",)),
        (r"head/kernel", ("embed", "vocabulary")),
        *((rf"(forward|backward)/{path}", axes) for path, axes in Gru.PARTITION_RULES),
        (r"in/kernel", ("embed", None, "mlp")),
        (r"in/bias", (None, "mlp")),
        (r"recurrent", (None, None, "mlp")),
        (r"context", (None, None, "mlp")),
        (r"key/kernel", ("embed", "mlp")),
        (r"query", (None, "mlp")),
        (r"score", ("mlp",)),
        (r"readout/kernel", ("mlp", "embed")),
        (r"readout/bias", ("embed",)),
    )

    def setup(self):
        c = self.config
        self.embed = Embed(self.vocab_size, c.embed_dim, "vocabulary", self.dtype)
        self.embed_norm = Norm(dtype=self.dtype)  # embeddings begin too small for the gates
        self.head = Head(self.vocab_size)
        mixer, _ = CELLS[c.cell]
        shape = TransformerConfig(
            num_layers=1, embed_dim=c.embed_dim, num_heads=1, pattern=c.cell, positions="none",
            expand=c.hidden_dim / c.embed_dim,
        )  # fmt: skip
        self.forward = mixer(shape, dtype=self.dtype)
        self.backward = mixer(shape, dtype=self.dtype)
        setattr(self, "in", Dense((mixer.gates, c.hidden_dim), use_bias=True, dtype=self.dtype))
        self.recurrent = recurrent_kernel(self, c.hidden_dim, mixer.gates)
        init = nn.initializers.lecun_normal(in_axis=0, out_axis=(-1,))
        wide = nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
        self.context = self.param("context", wide, (2 * c.embed_dim, mixer.gates, c.hidden_dim))
        self.key = Dense((c.attention_dim,), dtype=self.dtype)
        self.query = self.param("query", init, (c.hidden_dim, c.attention_dim))
        scale = nn.initializers.normal(c.attention_dim**-0.5)
        self.score = self.param("score", scale, (c.attention_dim,))
        self.readout = Dense((c.embed_dim,), use_bias=True, dtype=self.dtype)
        self.dropout = nn.Dropout(c.dropout)

    def __call__(self, source, source_segment_ids, tokens, positions, segment_ids) -> jax.Array:
        """Hidden states of the targets, [batch, length, embed_dim]; see `EncoderDecoder`."""
        reading = self._read(self.encode(source, source_segment_ids), len(tokens))
        context = TokenContext(positions, segment_ids)
        bounds = boundaries(context, continued=False)
        hidden, _, _ = self._decode(tokens, segment_ids, reading, source_segment_ids, bounds)
        return hidden

    def encode(self, source: jax.Array, segment_ids: jax.Array) -> Encoded:
        """Annotations of the source in both directions, [batch, source_length, 2 embed_dim]."""
        x = self._drop(self.embed_norm(self.embed(source)))
        context = lambda ids: TokenContext(jnp.zeros_like(ids), ids)
        ahead, _ = self.forward(x, context(segment_ids))
        back, _ = self.backward(jnp.flip(x, 1), context(jnp.flip(segment_ids, 1)))
        return Encoded(jnp.concatenate([ahead, jnp.flip(back, 1)], -1), segment_ids)

    def begin(self, source: jax.Array, lengths: jax.Array, max_length: int) -> Reading:
        del max_length
        ids = (jnp.arange(source.shape[1]) < lengths[:, None]).astype(jnp.int32)
        return self._read(self.encode(source, ids), len(source))

    def step(self, tokens, positions, state: Reading, lengths, source_lengths):
        context = TokenContext(positions, lengths=lengths)
        bounds = boundaries(context, continued=True)
        source_ids = (jnp.arange(state.keys.shape[1]) < source_lengths[:, None]).astype(jnp.int32)
        ids = jnp.ones_like(tokens)
        hidden, memory, _ = self._decode(tokens, ids, state, source_ids, bounds)
        return hidden, state._replace(memory=memory)

    def alignment(self, source: jax.Array, tokens: jax.Array) -> jax.Array:
        """The weights [batch, length, source_length] of what the decoder reads before each target.

        Args:
          source: [batch, source_length], all real.
          tokens: what the decoder reads, [batch, length], all real.
        """
        ids = jnp.ones_like(source)
        reading = self._read(self.encode(source, ids), len(tokens))
        bounds = boundaries(TokenContext(jnp.zeros_like(tokens)), continued=False)
        return self._decode(tokens, jnp.ones_like(tokens), reading, ids, bounds)[2]

    def _read(self, encoded: Encoded, rows: int) -> Reading:
        """What is read of a source, before the first target."""
        keys = self.key(encoded.hidden).astype(jnp.float32)
        memory = CELLS[self.config.cell][0].zeros(rows, self.config.hidden_dim)
        return Reading(encoded.hidden.astype(jnp.float32), keys, memory)

    def _decode(self, tokens, ids, reading: Reading, source_ids, bounds):
        """Hidden states and weights of targets, and the memory after the last."""
        embedded = self._drop(self.embed_norm(self.embed(tokens)))
        inputs = getattr(self, "in")(embedded).astype(jnp.float32)
        advance = CELLS[self.config.cell][1](self.recurrent)

        def step(memory, token):
            u, segment = token
            hidden = memory[1] if isinstance(memory, tuple) else memory
            scores = jnp.tanh((hidden @ self.query)[:, None] + reading.keys) @ self.score
            seen = (source_ids == segment[:, None]) & (segment[:, None] != 0)
            weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), -1) * seen
            read = jnp.einsum("bs,bsa->ba", weights, reading.annotations)
            memory, hidden = advance(memory, u + jnp.einsum("ba,agh->bgh", read, self.context))
            return memory, (hidden, read, weights)

        (hidden, read, weights), memory = loop(step, (inputs, ids), reading.memory, bounds)
        parts = [x.astype(self.dtype) for x in (hidden, read, embedded)]
        return self._drop(jnp.tanh(self.readout(jnp.concatenate(parts, -1)))), memory, weights

    def _drop(self, x: jax.Array) -> jax.Array:
        return self.dropout(x, deterministic=not self.has_rng("dropout"))

    def head_kernel(self) -> jax.Array:
        """What hidden states are multiplied by, [embed_dim, vocab_size], float32."""
        return self.head(self.config.embed_dim)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[batch, length, embed_dim] -> [batch, length, vocab_size], float32."""
        return output_logits(hidden, self.head_kernel(), None)

    def init_all(self, tokens: jax.Array) -> jax.Array:
        """The logits of tokens given themselves, by every parameter; call `init` with it."""
        ids, positions = jnp.ones_like(tokens), jnp.zeros_like(tokens)
        return self.logits(self(tokens, ids, tokens, positions, ids))
