"""An encoder-decoder transformer (Vaswani et al. 2017): sources and targets in, logits out."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

import kernels_pallas
from genai_jax.networks.sequence import perceiver, transformer
from genai_jax.networks.sequence.config import TransformerConfig
from genai_jax.networks.sequence.cross_attention import CrossAttention
from genai_jax.networks.sequence.flops import transformer_forward_flops
from genai_jax.networks.sequence.mixers.protocol import Encoded
from genai_jax.networks.sequence.perceiver import LatentReader
from genai_jax.networks.sequence.state import StackState
from genai_jax.networks.sequence.transformer import Transformer

PARTITION_RULES = (*perceiver.PARTITION_RULES, *transformer.PARTITION_RULES)

CONVENTION = (
    "6 x matmul parameters (head counted, input embedding not) x tokens of sources and targets + "
    "causal attention halved, that of the encoder and to the source not; as if one pair filled "
    "each row; where latents read the source, the encoder counts them; no rematerialization"
)


class EncoderDecoder(nn.Module):
    """Two transformers with one input embedding; the encoder sees both sides.

    Attributes:
      config: shapes and choices of both, with the number of blocks of the decoder.
      encoder_layers: blocks of the encoder.
      vocab_size: rows of the embeddings.
      latents: vectors that read the source, and that the encoder works on in its place; 0: none.
      backend: backend of the kernels.
      dtype: dtype of matmuls and activations.
    """

    config: TransformerConfig
    encoder_layers: int
    vocab_size: int
    latents: int = 0
    backend: str = "auto"
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        shape = dataclasses.replace(self.config, num_layers=self.encoder_layers)
        shared = dict(vocab_size=self.vocab_size, backend=self.backend, dtype=self.dtype)
        self.encoder = Transformer(shape, **shared, mask=kernels_pallas.Full())
        self.decoder = Transformer(self.config, **shared, cross=True)
        if self.latents:
            once = dataclasses.replace(shape, num_layers=1, pattern=None)
            self.reader = LatentReader(once, self.latents, self.backend, self.dtype)

    def __call__(
        self,
        source: jax.Array,
        source_segment_ids: jax.Array,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
    ) -> jax.Array:
        """Hidden states of the targets, [batch, length, embed_dim].

        Args:
          source: tokens [batch, source_length].
          source_segment_ids: [batch, source_length]; 0 is padding.
          tokens: what the decoder reads, [batch, length].
          positions: [batch, length].
          segment_ids: [batch, length]; a target belongs to the source of its segment.
        """
        encoded = self.encode(source, source_segment_ids)
        return self.decoder(tokens, positions, segment_ids, source=encoded)[0]

    def encode(self, source: jax.Array, segment_ids: jax.Array) -> Encoded:
        """The encoder's hidden states; positions count from 0 in each segment."""
        x, positions = self.decoder.embed_tokens(source), positions_within(segment_ids)
        if self.latents:
            x, segment_ids = self.reader(x, positions, segment_ids)
            positions = None
        hidden, _ = self.encoder.from_embeddings(x, positions, segment_ids)
        return Encoded(hidden, segment_ids)

    def begin(self, source: jax.Array, lengths: jax.Array, max_length: int) -> StackState:
        """The decoding state after sources [batch, source_length] of these lengths [batch].

        max_length: most tokens of a target.
        """
        rows, source_length = source.shape
        encoded = self.encode(source, _ids_of(lengths, source_length))
        state = transformer.empty_state(
            self.config, rows, max_length, self.dtype, source_length=self.latents or source_length
        )
        # A token of length 0 leaves nothing but the keys and values of the source.
        nothing, start = jnp.zeros(rows, jnp.int32), jnp.zeros((rows, 1), jnp.int32)
        return self.decoder(start, start, state=state, lengths=nothing, source=encoded)[1]

    def step(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        state: StackState,
        lengths: jax.Array,
        source_lengths: jax.Array,
    ) -> tuple[jax.Array, StackState]:
        """Hidden states of new tokens [batch, new], and the state with them; see `Transformer`."""
        source_length = state.places[0].keys.shape[2]
        if self.latents:
            source_lengths = jnp.where(source_lengths > 0, self.latents, 0)
        seen = Encoded(None, _ids_of(source_lengths, source_length))
        return self.decoder(tokens, positions, state=state, lengths=lengths, source=seen)

    def head_kernel(self) -> jax.Array:
        """What hidden states are multiplied by, [embed_dim, vocab_size], float32."""
        return self.decoder.head_kernel()

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[batch, length, embed_dim] -> [batch, length, vocab_size], float32."""
        return self.decoder.logits(hidden)

    def init_all(self, tokens: jax.Array) -> jax.Array:
        """The logits of tokens given themselves, by every parameter; call `init` with it."""
        ids, positions = jnp.ones_like(tokens), jnp.zeros_like(tokens)
        return self.logits(self(tokens, ids, tokens, positions, ids))


def positions_within(segment_ids: jax.Array) -> jax.Array:
    """The place of each token in its segment, which is a run of equal ids: [batch, length]."""
    place = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    begins = jnp.diff(segment_ids, axis=1, prepend=-1) != 0
    return place - jax.lax.cummax(jnp.where(begins, place, 0), axis=1)


def _ids_of(lengths: jax.Array, length: int) -> jax.Array:
    """Segment ids [batch, length] of one segment, with padding after it."""
    return (jnp.arange(length) < lengths[:, None]).astype(jnp.int32)


def forward_flops(
    config: TransformerConfig,
    encoder_layers: int,
    vocab_size: int,
    source_length: int,
    length: int,
    latents: int = 0,
) -> float:
    """FLOPs of a forward pass over one row: the encoder's attention and cross-attention in full."""
    shape, reading = dataclasses.replace(config, num_layers=encoder_layers), 0.0
    if latents:
        once = dataclasses.replace(config, num_layers=1, pattern=None)
        reading = latents * sum(CrossAttention.flops(once, source_length, latents).values())
        source_length = latents
    encoder = transformer_forward_flops(shape, vocab_size, source_length)
    # Counted for a causal mask, which leaves half; and the encoder has no output embedding.
    encoder |= {"attention": 2 * encoder["attention"], "head": 0}
    decoder = transformer_forward_flops(config, vocab_size, length)
    cross = CrossAttention.flops(config, source_length, length)
    of_targets = sum(decoder.values()) + sum(cross.values())
    return reading + source_length * sum(encoder.values()) + length * of_targets
