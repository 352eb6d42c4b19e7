"""Sampling tokens with a decoding state, in one compiled loop."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from genai_jax.decoding.filters import sample_tokens

# One pass of a network over new tokens of each row:
#   (tokens [batch, n], positions [batch, n], lengths [batch], state)
#     -> (logits [batch, vocabulary] after the last real token of each row, state)
# The first `lengths` tokens of a row are real; the others are padding and must not enter the state.
# A row of length 0 keeps its state, and its logits mean nothing.
Step = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


class Generated(NamedTuple):
    tokens: jax.Array  # [batch, prompt_length + max_new_tokens]; each row from its own start
    lengths: jax.Array  # [batch], prompt and stop token included


def at_last_token(x: jax.Array, lengths: jax.Array) -> jax.Array:
    """The entries of x [batch, n, ...] at the last real token of each row, [batch, 1, ...]."""
    last = jnp.maximum(lengths - 1, 0)
    return jnp.take_along_axis(x, last.reshape(-1, *(1,) * (x.ndim - 1)), 1)


def generate(
    step: Step,
    state: Any,
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

    The tokens of a row depend on its index and `rng`, not on the other rows or their padding.

    Args:
      step: one pass of the network over new tokens.
      state: an empty state with room for prompt_length + max_new_tokens tokens.
      prompts: [batch, prompt_length] tokens, padded on the right.
      lengths: [batch] lengths of the prompts, at least 1.
      rng: key.
      max_new_tokens: maximum number of tokens to sample.
      stop_tokens: a row ends with the first of these that it samples.
      temperature, top_k, top_p: see `decoding.filters`.
    """
    batch, prompt_length = prompts.shape
    rows = jnp.arange(batch)
    row_rngs = jax.vmap(jax.random.fold_in, (None, 0))(rng, rows)
    stops = jnp.array(stop_tokens, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(prompt_length), prompts.shape)
    logits, state = step(prompts, positions, lengths, state)
    tokens = jnp.pad(prompts, ((0, 0), (0, max_new_tokens)))

    def unfinished(carry):
        count, _, _, done, _, _ = carry
        return (count < max_new_tokens) & ~jnp.all(done)

    def body(carry):
        count, tokens, ends, done, logits, state = carry
        rngs = jax.vmap(jax.random.fold_in, (0, None))(row_rngs, count)
        sampled = sample_tokens(rngs, logits, temperature, top_k, top_p)
        tokens = tokens.at[rows, ends].set(jnp.where(done, tokens[rows, ends], sampled))
        real = jnp.where(done, 0, 1)
        next_logits, state = step(sampled[:, None], ends[:, None], real, state)
        ends = jnp.where(done, ends, ends + 1)
        done = done | jnp.isin(sampled, stops)
        return count + 1, tokens, ends, done, next_logits, state

    start = (jnp.int32(0), tokens, lengths, jnp.zeros(batch, bool), logits, state)
    _, tokens, ends, *_ = jax.lax.while_loop(unfinished, body, start)
    return Generated(tokens, ends)
