"""Linear recurrences whose state is a vector with a decay per channel."""

import jax
import jax.numpy as jnp

from genai_jax.networks.sequence.recurrences.boundaries import Boundaries, masked


def linear_recurrence(
    decay: jax.Array,
    new: jax.Array,
    state: jax.Array,
    bounds: Boundaries = Boundaries(),  # noqa: B008 (immutable)
) -> tuple[jax.Array, jax.Array]:
    """h_t = decay_t h_{t-1} + new_t for all tokens in parallel (Blelloch 1990, section 1.4).

    Args:
      decay, new: [batch, length, channels], float32.
      state: [batch, channels], h before the first token.
      bounds: padding, and where documents begin.

    Returns:
      h after each token [batch, length, channels], and the final one [batch, channels].
    """
    decay, new = masked(decay, bounds.real, 1.0), masked(new, bounds.real)
    if bounds.begins is not None:
        decay = jnp.where(bounds.begins[..., None], 0, decay)
    new = new.at[:, 0].add(decay[:, 0] * state)
    compose = lambda left, right: (left[0] * right[0], right[0] * left[1] + right[1])
    _, after = jax.lax.associative_scan(compose, (decay, new), axis=1)
    return after, after[:, -1]


def linear_step(state: jax.Array, inputs: tuple[jax.Array, jax.Array]):
    """The same recurrence, for `loop`: state [batch, channels], inputs (decay, new)."""
    decay, new = inputs
    state = decay * state + new
    return state, state
