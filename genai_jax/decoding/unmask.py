"""Sampling tokens of a masked model, in any order: all at once, then again where it is not sure."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from genai_jax.decoding.filters import sample_tokens

# Tokens [batch, length], some of them masks, -> logits [batch, length, vocabulary] of what each is.
Predict = Callable[[jax.Array], jax.Array]


def mask_predict(
    predict: Predict,
    tokens: jax.Array,
    mask_id: int,
    rngs: jax.Array,
    *,
    steps: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> jax.Array:
    """Replaces masks by mask-predict (Ghazvininejad et al. 2019, section 3.1).

    Each step samples every mask. Of the n tokens that are masks at the start, the
    n (steps - i) / steps of which the model is least confident become masks again after step i.
    The confidence is the probability that a token had when it was sampled; the others keep theirs.

    Args:
      predict: the network.
      tokens: [batch, length]; what is not a mask at the start is kept.
      mask_id: the mask.
      rngs: a key for each row.
      steps: calls of `predict`.
      temperature, top_k, top_p: see `decoding.filters`; the confidence does not depend on them.
    """
    free = tokens == mask_id
    count = jnp.sum(free, -1, keepdims=True)

    def step(i, carry):
        tokens, confidence = carry
        masked = tokens == mask_id
        logits = predict(tokens)
        sampled = _sample(_fold_in(rngs, i), logits, temperature, top_k, top_p)
        log_probs = jax.nn.log_softmax(logits)
        chosen = jnp.take_along_axis(log_probs, sampled[..., None], -1)[..., 0]
        tokens = jnp.where(masked, sampled, tokens)
        confidence = jnp.where(masked, chosen, confidence)
        again = count * (steps - 1 - i) // steps
        ranks = jnp.argsort(jnp.argsort(confidence, -1), -1)
        return jnp.where(ranks < again, mask_id, tokens), confidence

    confidence = jnp.where(free, 0.0, jnp.inf)
    return jax.lax.fori_loop(0, steps, step, (tokens, confidence))[0]


def ancestral(
    predict: Predict,
    tokens: jax.Array,
    mask_id: int,
    rngs: jax.Array,
    *,
    steps: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> jax.Array:
    """Replaces masks by the reverse process of absorbing-state diffusion, from t = 1 to 0.

    A step from t to s replaces each mask with probability (t - s) / t by a sample of what it is,
    which then stays (Sahoo et al. 2024, equation 7). Arguments as for `mask_predict`.
    """

    def step(i, tokens):
        rng = jax.vmap(jax.random.split, (0, None))(_fold_in(rngs, i), 2)
        sampled = _sample(rng[:, 0], predict(tokens), temperature, top_k, top_p)
        chance = jax.vmap(lambda key: jax.random.uniform(key, tokens.shape[1:]))(rng[:, 1])
        replaced = (tokens == mask_id) & (chance * (steps - i) < 1)
        return jnp.where(replaced, sampled, tokens)

    return jax.lax.fori_loop(0, steps, step, tokens)


def _fold_in(rngs: jax.Array, step: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (0, None))(rngs, step)


def _sample(rngs, logits, temperature, top_k, top_p) -> jax.Array:
    """A token for each position, [batch, length]; a key for each row."""
    batch, length, vocabulary = logits.shape
    keys = jax.vmap(jax.random.split, (0, None))(rngs, length).reshape(-1)
    flat = sample_tokens(keys, logits.reshape(-1, vocabulary), temperature, top_k, top_p)
    return flat.reshape(batch, length)
