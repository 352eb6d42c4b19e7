"""Which tokens may be sampled, and sampling one."""

import jax
import jax.numpy as jnp


def filter_logits(logits: jax.Array, *, top_k: int = 0, top_p: float = 1.0) -> jax.Array:
    """Sets the logits of tokens that may not be sampled to -inf.

    Args:
      logits: [..., vocabulary], float32, temperature already applied.
      top_k: keep the k most likely tokens; 0 keeps all.
      top_p: of those, renormalized, keep the smallest set of the most likely whose mass reaches p
        (Holtzman et al. 2020, equation 2). Among equals the lower id comes first.
    """
    vocabulary = logits.shape[-1]
    if not 0 < top_k < vocabulary and top_p >= 1:
        return logits
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, -1)
    if 0 < top_k < vocabulary:
        ranked = jnp.where(jnp.arange(vocabulary) < top_k, ranked, -jnp.inf)
    if top_p < 1:
        probabilities = jax.nn.softmax(ranked, -1)
        before = jnp.cumsum(probabilities, -1) - probabilities
        # A token is needed while the mass before it falls short of p. The margin is the rounding of
        # a float32 sum, without which (0.5, 0.25, 0.25) at p = 0.5 can keep two tokens.
        short = (before < top_p - 1e-6).at[..., 0].set(True)
        ranked = jnp.where(short, ranked, -jnp.inf)
    return jnp.put_along_axis(jnp.zeros_like(logits), order, ranked, -1, inplace=False)


def sample_tokens(
    rngs: jax.Array, logits: jax.Array, temperature: float, top_k: int, top_p: float
) -> jax.Array:
    """One token per row, [batch] int32, from one key per row; temperature 0 takes the argmax."""
    if temperature == 0:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    logits = filter_logits(logits / temperature, top_k=top_k, top_p=top_p)
    return jax.vmap(jax.random.categorical)(rngs, logits).astype(jnp.int32)
