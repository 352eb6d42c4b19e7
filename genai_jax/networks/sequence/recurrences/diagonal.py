"""Linear recurrences whose state is a vector with a decay per channel."""

import jax
import jax.numpy as jnp

from genai_jax.networks.sequence.recurrences.boundaries import Boundaries, masked
from kernels_pallas import device


def linear_recurrence(
    decay: jax.Array,
    new: jax.Array,
    state: jax.Array,
    bounds: Boundaries = Boundaries(),  # noqa: B008 (immutable)
) -> tuple[jax.Array, jax.Array]:
    """h_t = decay_t h_{t-1} + new_t for all tokens; differentiable in reverse mode only.

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
    after = _recurrence(decay, new)
    return after, after[:, -1]


@jax.custom_vjp
def _recurrence(decay, new):
    return _run(decay, new)


def _forward(decay, new):
    after = _run(decay, new)
    return after, (decay, after)


def _backward(residuals, d_after):
    """The same recurrence from the end to the beginning, with the decays of the token after."""
    decay, after = residuals
    d_new = _run(jnp.roll(decay, -1, 1), d_after, reverse=True)
    before = jnp.pad(after, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    return d_new * before, d_new


_recurrence.defvjp(_forward, _backward)


def _run(decay, new, reverse=False):
    """h after each token, from h = 0; the first decay (the last in reverse) has no effect.

    A loop on CPU; elsewhere all tokens in parallel (Blelloch 1990, section 1.4).
    """
    if device.platform() != "cpu":
        compose = lambda left, right: (left[0] * right[0], right[0] * left[1] + right[1])
        return jax.lax.associative_scan(compose, (decay, new), axis=1, reverse=reverse)[1]

    def step(h, token):
        decay, new = token
        h = decay * h + new
        return h, h

    first = lambda a: jnp.moveaxis(a, 1, 0)
    start = jnp.zeros_like(new[:, 0])
    _, after = jax.lax.scan(step, start, (first(decay), first(new)), reverse=reverse)
    return jnp.moveaxis(after, 0, 1)


def linear_step(state: jax.Array, inputs: tuple[jax.Array, jax.Array]):
    """The same recurrence, for `loop`: state [batch, channels], inputs (decay, new)."""
    decay, new = inputs
    state = decay * state + new
    return state, state
