"""Drawing tokens with a cache, in one compiled loop."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from genai_jax.decoding.filters import draw

# (tokens [batch, n], positions [batch, n], select [batch], cache)
#   -> (logits [batch, vocabulary] after token `select` of each row, cache)
Step = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


class Generated(NamedTuple):
    tokens: jax.Array  # [batch, prompt_length + max_new_tokens]; each row from its own start
    lengths: jax.Array  # [batch], prompt and stop token included


def generate(
    step: Step,
    cache: Any,
    prompts: jax.Array,
    lengths: jax.Array,
    rng: jax.Array,
    *,
    max_new_tokens: int,
    stop_tokens: tuple[int, ...] = (),
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Generated:
    """Continues every row from its own prompt until a stop token or `max_new_tokens`.

    What a row draws depends on its number and `rng`, not on the other rows or their padding.

    Args:
      step: one pass of the network over new tokens.
      cache: an empty cache with room for prompt_length + max_new_tokens tokens.
      prompts: [batch, prompt_length] tokens, padded on the right.
      lengths: [batch] lengths of the prompts, at least 1.
      rng: key.
      max_new_tokens: at most this many are drawn.
      stop_tokens: a row ends with the first of these it draws.
      temperature, top_k, top_p: see `decoding.filters`.
    """
    batch, prompt_length = prompts.shape
    rows = jnp.arange(batch)
    row_rngs = jax.vmap(jax.random.fold_in, (None, 0))(rng, rows)
    stops = jnp.array(stop_tokens, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(prompt_length), prompts.shape)
    # Keys of the padding enter the cache, but no query looks beyond its own position, and a drawn
    # token overwrites them before one gets there.
    logits, cache = step(prompts, positions, lengths - 1, cache)
    tokens = jnp.pad(prompts, ((0, 0), (0, max_new_tokens)))

    def unfinished(carry):
        count, _, _, done, _, _ = carry
        return (count < max_new_tokens) & ~jnp.all(done)

    def body(carry):
        count, tokens, ends, done, logits, cache = carry
        rngs = jax.vmap(jax.random.fold_in, (0, None))(row_rngs, count)
        drawn = draw(rngs, logits, temperature, top_k, top_p)
        tokens = tokens.at[rows, ends].set(jnp.where(done, tokens[rows, ends], drawn))
        next_logits, cache = step(drawn[:, None], ends[:, None], jnp.zeros_like(ends), cache)
        ends = jnp.where(done, ends, ends + 1)
        done = done | jnp.isin(drawn, stops)
        return count + 1, tokens, ends, done, next_logits, cache

    start = (jnp.int32(0), tokens, lengths, jnp.zeros(batch, bool), logits, cache)
    _, tokens, ends, *_ = jax.lax.while_loop(unfinished, body, start)
    return Generated(tokens, ends)
