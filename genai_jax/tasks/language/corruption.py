"""What a masked language model reads instead of the text (Devlin et al. 2019, section 3.1)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Corrupted(NamedTuple):
    """Tokens of which some are to be predicted, [batch, length]."""

    tokens: jax.Array
    chosen: jax.Array  # bool: the targets; the loss counts only these


def corrupt(
    key: jax.Array,
    tokens: jax.Array,
    counts: jax.Array,
    *,
    mask_id: int,
    known: int,
    rate: float,
    span: float | None,
    mask_fraction: float,
    random_fraction: float,
) -> Corrupted:
    """Chooses targets, and replaces most of them.

    Of the chosen, `mask_fraction` become masks, `random_fraction` random tokens, and the others
    stay. Where whole spans are chosen, all tokens of a span have the same fate (Joshi et al. 2020,
    section 3.1).

    Args:
      key: random key.
      tokens: [batch, length].
      counts: [batch, length] bool, the tokens that may be chosen.
      mask_id: the mask.
      known: random tokens are below it.
      rate: share of tokens that are chosen.
      span: mean length of a span; None chooses every token by itself.
      mask_fraction: share of the chosen that become masks.
      random_fraction: share of the chosen that become random tokens.
    """
    span_key, fate_key, token_key = jax.random.split(key, 3)
    chosen = span_mask(span_key, tokens.shape, rate, span)
    fate = jax.random.uniform(fate_key, tokens.shape)
    if span is not None:
        fate = jnp.take_along_axis(fate, _run_starts(chosen), -1)
    chosen &= counts
    other = jax.random.randint(token_key, tokens.shape, 0, known, tokens.dtype)
    replaced = jnp.where(fate < mask_fraction, mask_id, other)
    replaced = jnp.where(fate < mask_fraction + random_fraction, replaced, tokens)
    return Corrupted(jnp.where(chosen, replaced, tokens), chosen)


def span_mask(
    key: jax.Array, shape: tuple[int, ...], rate: float, span: float | None = None
) -> jax.Array:
    """Which positions [..., length] are chosen, bool.

    A stationary Markov chain along the row: each position is chosen with probability `rate`, and
    the lengths of the runs of chosen positions are geometric with mean `span`. Independent choices
    are the case span = 1 / (1 - rate), which None stands for; no chain has shorter spans.
    """
    span = 1 / (1 - rate) if span is None else span
    enter, leave = rate / ((1 - rate) * span), 1 / span
    start_key, key = jax.random.split(key)
    start = jax.random.uniform(start_key, (*shape[:-1], 1)) < rate
    u = jax.random.uniform(key, shape)
    # One number enters a span if it is low, leaves it if it is high, and keeps to it in between:
    # the state is what the last of these that was not in between says.
    decided = (u < enter) | (u >= 1 - leave)
    last = jax.lax.cummax(jnp.where(decided, jnp.arange(shape[-1]), -1), axis=len(shape) - 1)
    entered = jnp.take_along_axis(u < enter, jnp.maximum(last, 0), -1)
    return jnp.where(last < 0, start, entered)


def _run_starts(chosen: jax.Array) -> jax.Array:
    """Of each position, the first one of its run of equal values, [batch, length] integers."""
    begins = jnp.diff(chosen.astype(jnp.int32), axis=-1, prepend=2) != 0
    return jax.lax.cummax(jnp.where(begins, jnp.arange(chosen.shape[-1]), 0), axis=1)
