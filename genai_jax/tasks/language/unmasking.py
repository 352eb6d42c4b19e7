"""Text from models that fill in masks: whole texts at once, or block by block."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from genai_jax.data.text.tokenization import Tokenizer
from genai_jax.decoding.generate import Generated
from genai_jax.tasks.language.sampling import Settings, TextSampler, TokenSampler
from genai_jax.tasks.protocol import Params


class Unmasker(NamedTuple):
    """How a model fills in masks.

    Attributes:
      logits: (params, tokens, positions, segment_ids, start, size) -> logits of `size` tokens from
        `start` on, [batch, size, tokens of the tokenizer]; arrays [batch, length] before.
      fill: `decoding.unmask.mask_predict` or `ancestral`.
      mask_id: the mask.
      block: tokens of a block, which sees only itself and what comes before; None: all that is
        generated is one block.
      max_length: number of positions that the model supports; None for any.
    """

    logits: Callable[..., jax.Array]
    fill: Callable[..., jax.Array]
    mask_id: int
    block: int | None = None
    max_length: int | None = None


class UnmaskingTokenSampler(TokenSampler):
    """A `TokenSampler` that fills in masks, `settings.steps` passes for each block.

    The model reads no boundary before a text. Its blocks begin where the prompt ends; every pass
    reads the whole row.
    """

    decoder: Unmasker

    def _generate(
        self, params: Params, prompts, lengths, key, source: None, settings: Settings
    ) -> Generated:
        prompts = nn.with_logical_constraint(prompts, ("batch", None))
        unmasker, new, width = self.decoder, settings.max_tokens, prompts.shape[1]
        block = unmasker.block or new
        count = -(-new // block)
        start = width if unmasker.block is None else -(-width // block) * block
        # Prompts end where the first block starts; their own first column is the boundary.
        columns = jnp.arange(start + count * block)
        own = columns - (start - lengths[:, None])
        read = jnp.take_along_axis(prompts, jnp.clip(own, 0, width - 1), 1)
        tokens = jnp.where(columns < start, read, unmasker.mask_id)
        tokens = self._fill_blocks(params, tokens, own - 1, key, start, count, settings)
        is_stop = jnp.isin(tokens[:, start : start + new], jnp.array(settings.stop_tokens))
        size = jnp.where(is_stop.any(1), jnp.argmax(is_stop, 1) + 1, new)
        back = jnp.arange(width + new) + (start - lengths[:, None])
        back = jnp.minimum(back, len(columns) - 1)
        return Generated(jnp.take_along_axis(tokens, back, 1), lengths + size)

    def _fill_blocks(self, params, tokens, positions, key, start, count, settings) -> jax.Array:
        """Fills `count` blocks from `start` on, one after the other, until all rows have ended.

        Where a position is negative, there is only padding.
        """
        unmasker, block = self.decoder, (tokens.shape[1] - start) // count
        rngs = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(tokens)))
        segment_ids = (positions >= 0).astype(jnp.int32)
        largest = tokens.shape[1] if unmasker.max_length is None else unmasker.max_length - 1
        positions = jnp.clip(positions, 0, largest)
        stops = jnp.array(settings.stop_tokens)

        def fill(carry):
            i, tokens = carry
            at = start + i * block
            put = lambda part: jax.lax.dynamic_update_slice_in_dim(tokens, part, at, 1)
            predict = lambda part: unmasker.logits(
                params, put(part), positions, segment_ids, at, block
            )
            filled = unmasker.fill(
                predict, jax.lax.dynamic_slice_in_dim(tokens, at, block, 1), unmasker.mask_id,
                jax.vmap(jax.random.fold_in, (0, None))(rngs, i), steps=settings.steps or block,
                temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p,
            )  # fmt: skip
            return i + 1, put(filled)

        def unfinished(carry):
            i, tokens = carry
            return (i < count) & ~jnp.isin(tokens[:, start:], stops).any(1).all()

        return jax.lax.while_loop(unfinished, fill, (jnp.int32(0), tokens))[1]


class UnmaskingSampler(TextSampler):
    """A `TextSampler` whose tokens come from an `Unmasker`."""

    def __init__(self, unmasker: Unmasker, tokenizer: Tokenizer):
        self.tokens, self.tokenizer = UnmaskingTokenSampler(unmasker), tokenizer
