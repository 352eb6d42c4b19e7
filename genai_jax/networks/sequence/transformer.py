"""A transformer: tokens or vectors in, hidden states out; a decoder unless a mask is given."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

import kernels_pallas
from genai_jax.config import ConfigError
from genai_jax.networks.experts import mixture
from genai_jax.networks.experts.config import MoeConfig
from genai_jax.networks.layers.dense import Norm
from genai_jax.networks.layers.embedding import Embed
from genai_jax.networks.layers.positions import rotation, sinusoidal
from genai_jax.networks.layers.relative_positions import RelativeTable
from genai_jax.networks.parallel.axes import STAGE, ParallelConfig, axis_size, describe_axis
from genai_jax.networks.sequence.blocks import Block
from genai_jax.networks.sequence.config import TransformerConfig
from genai_jax.networks.sequence.cross_attention import CrossAttention, CrossState
from genai_jax.networks.sequence.head import Head, output_logits
from genai_jax.networks.sequence.mixers import load_mixer, parameter_name
from genai_jax.networks.sequence.mixers.protocol import Encoded, TokenContext
from genai_jax.networks.sequence.stack import BlockStack, stacked_rules
from genai_jax.networks.sequence.state import StackState

_MLP_RULES = (
    (r"(mlp|shared)/(up|gate)/kernel", ("embed", "mlp")),
    (r"(mlp|shared)/down/kernel", ("mlp", "embed")),
    (r"mlp/(up|gate)/bias", ("mlp",)),
    (r"mlp/down/bias", ("embed",)),
)


def partition_rules(config: TransformerConfig) -> tuple[tuple[str, tuple], ...]:
    """(parameter path, logical axes) of the network. The first match in a path decides."""
    mixer_rules = ()
    for name in dict.fromkeys(config.mixers):
        below = rf"\b{parameter_name(name)}/"  # "lstm" is not "mlstm"
        mixer_rules += stacked_rules(below, load_mixer(name).PARTITION_RULES)
    return (
        (r"position_embed/embedding", (None, "embed")),
        (r"relative_bias/table", (None, "heads")),
        (r"embed/embedding", ("vocabulary", "embed")),
        *mixer_rules,
        *stacked_rules(r"\bcross_attention/", CrossAttention.PARTITION_RULES),
        *stacked_rules("mlp/", mixture.PARTITION_RULES),
        *stacked_rules("", _MLP_RULES),
        (r"layers/(block_\d+/)?\w+_norm/(scale|bias)", ("layers", "embed")),
        (r"final_norm/(scale|bias)", ("embed",)),
        (r"head/kernel", ("embed", "vocabulary")),
    )


PARTITION_RULES = partition_rules(TransformerConfig())  # those of attention


def empty_state(
    config: TransformerConfig,
    batch: int,
    max_length: int,
    dtype,
    rewind: int = 0,
    source_length: int | None = None,
) -> StackState:
    """The decoding state of all layers before the first token.

    Args:
      config: shapes and the pattern of mixers.
      batch: number of rows.
      max_length: most tokens of a row.
      dtype: dtype of what states keep of tokens.
      rewind: number of tokens that `StackState.rewind` can take back.
      source_length: tokens of a source that blocks with cross-attention see; None without it.
    """
    periods = config.num_layers // len(config.mixers)
    repeat = lambda a: jnp.broadcast_to(a, (periods, *a.shape))
    states = (
        load_mixer(name).empty_state(config, batch, max_length, dtype, rewind)
        for name in config.mixers
    )
    if source_length is not None:
        seen = jnp.zeros((batch, source_length, config.kv_heads, config.head_width), dtype)
        states = (CrossState(state, seen, seen) for state in states)
    return StackState(tuple(jax.tree.map(repeat, state) for state in states))


class Transformer(nn.Module):
    """Embeds tokens, applies the blocks, normalizes. `logits` maps the result to the vocabulary.

    Each part can be used without the others: `embed_tokens`, then `from_embeddings`, which takes
    any vectors, then `logits`. A part that is not used has no parameters.

    Attributes:
      config: shapes and choices.
      vocab_size: rows of the input and output embeddings.
      backend: backend of the kernels.
      dtype: dtype of matmuls and activations.
      parallel: how the mesh axes `sequence` and `stage` are used.
      moe: the experts, if any.
      mask: which tokens a token may see; None for those before it, within the window of the config.
      cross: whether every block attends to a source as well.
    """

    config: TransformerConfig
    vocab_size: int
    backend: str = "auto"
    dtype: jnp.dtype = jnp.float32
    parallel: ParallelConfig = ParallelConfig()
    moe: MoeConfig = MoeConfig()
    mask: kernels_pallas.Mask | None = None
    cross: bool = False

    def setup(self):
        c = self.config
        self.embed = Embed(self.vocab_size, c.embed_dim, "vocabulary", self.dtype)
        if c.positions == "learned":
            self.position_embed = Embed(c.max_length, c.embed_dim, dtype=self.dtype)
        if c.positions == "relative_buckets":
            both_sides = isinstance(self.mask, kernels_pallas.Full)
            self.relative_bias = RelativeTable(c.buckets, c.furthest, both_sides, c.num_heads)
        if not c.tie_embeddings:
            self.head = Head(self.vocab_size, c.width_growth)
        self.dropout = nn.Dropout(c.dropout)
        self.layers = self._stack().module()
        self.final_norm = Norm(c.norm, dtype=self.dtype)

    def _stack(self) -> BlockStack:
        c = self.config
        blocks = tuple(
            functools.partial(
                Block, config=c, mixer=mixer, backend=self.backend, dtype=self.dtype,
                parallel=self.parallel, moe=self.moe, cross=self.cross,
            )
            for mixer in c.mixers
        )  # fmt: skip
        return BlockStack(blocks, c.num_layers, c.scan_layers, c.remat, self.parallel)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        state: StackState | None = None,
        lengths: jax.Array | None = None,
        source: Encoded | None = None,
    ) -> tuple[jax.Array, StackState | None]:
        """Hidden states [batch, length, embed_dim] of tokens [batch, length]: integers.

        The other arguments and the results are those of `from_embeddings`.
        """
        return self.from_embeddings(
            self.embed_tokens(tokens), positions, segment_ids, state, lengths, source
        )

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """[batch, length] integers -> [batch, length, embed_dim], without positions."""
        return self.embed(tokens)

    def from_embeddings(
        self,
        x: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        state: StackState | None = None,
        lengths: jax.Array | None = None,
        source: Encoded | None = None,
    ) -> tuple[jax.Array, StackState | None]:
        """Hidden states [batch, length, embed_dim], and the state with these tokens added.

        Dropout acts when an rng named "dropout" is given.

        Args:
          x: vectors [batch, length, embed_dim], in the order of `parallel.axes.token_order`.
          positions: [batch, length]; counted from 0 in the order of the tokens if not given.
          segment_ids: [batch, length]; a token sees only tokens of its own segment, and 0 is
            padding. Not for use with a state, whose rows are one segment each.
          state: what `empty_state` or an earlier call returned; positions[:, 0] says where each row
            continues.
          lengths: [batch] real tokens of each row, which come first; the rest is padding, which
            does not enter the state. None: all are real. Not for use with the zigzag order.
          source: what an encoder has read, for blocks with cross-attention.

        Raises:
          ConfigError: sizes that the mesh does not divide.
        """
        c = self.config
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        if c.positions == "learned":
            x = x + self.position_embed(positions)
        elif c.positions == "sinusoidal":
            x = x + sinusoidal(positions, c.embed_dim).astype(self.dtype)
        x = self.dropout(x, deterministic=not self.has_rng("dropout"))
        x = nn.with_logical_constraint(x, ("batch", "length", "activation_embed"))
        context = TokenContext(positions, segment_ids, lengths, self.mask, source=source)
        if lengths is not None and state is None:
            context = dataclasses.replace(context, segment_ids=_without_padding(context))
        if c.positions == "relative_buckets":
            relative = self.relative_bias(x.shape[1] if state is None else None)
            context = dataclasses.replace(context, relative=relative)
        self._check_stages(state)
        x, state = self._stack().run(self.layers, x, context, state, self._add_rotation)
        return self.final_norm(x), state

    def _add_rotation(self, context: TokenContext) -> TokenContext:
        c = self.config
        if c.positions != "rope":
            return context
        angles = rotation(
            context.positions, c.head_width, theta=c.rope_theta, scaling=c.rotary_scaling
        )
        return dataclasses.replace(context, rotation=angles)

    def _check_stages(self, state: StackState | None):
        pipelined = axis_size(STAGE) > 1 and state is None and not self.is_initializing()
        if pipelined and self.config.positions == "relative_buckets":
            raise ConfigError(
                f"{describe_axis(STAGE)}: the biases of relative positions are shared by all "
                "layers, which cannot run as a pipeline"
            )
        if pipelined and self.moe.num_experts:
            raise ConfigError(
                f"{describe_axis(STAGE)}: a mixture of experts cannot run as a pipeline; use the "
                "mesh axis `expert`"
            )

    def head_kernel(self) -> jax.Array:
        """What hidden states are multiplied by, [embed_dim, vocab_size], float32."""
        c = self.config
        kernel = self.embed.embedding.T if c.tie_embeddings else self.head(c.embed_dim)
        return kernel if c.width_growth == 1 else kernel / c.width_growth

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[batch, length, embed_dim] -> [batch, length, vocab_size], float32."""
        return output_logits(hidden, self.head_kernel(), self.config.logits_soft_cap)

    def init_all(self, tokens: jax.Array) -> jax.Array:
        """The logits of tokens, by every parameter; call `init` with it."""
        return self.logits(self(tokens)[0])


def _without_padding(context: TokenContext) -> jax.Array:
    """Segment ids [batch, length] that are 0 for padding."""
    if context.segment_ids is None:
        return context.real.astype(jnp.int32)
    return jnp.where(context.real, context.segment_ids, 0)
