"""Any recurrence, token by token."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from genai_jax.networks.sequence.recurrences.boundaries import Boundaries

PyTree = Any


def loop(
    step: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    inputs: PyTree,
    state: PyTree,
    bounds: Boundaries = Boundaries(),  # noqa: B008 (immutable)
    *,
    fresh: PyTree = None,
    every: bool = False,
) -> tuple[PyTree, PyTree]:
    """Applies ``state, y = step(state, input)`` to one token of each row after the other.

    Args:
      step: from arrays [batch, ...] to such arrays.
      inputs: arrays [batch, length, ...].
      state: before the first token.
      bounds: padding, and where documents begin.
      fresh: the state before a document; zeros if None.
      every: whether to return the state after each token instead of the final one.

    Returns:
      The outputs [batch, length, ...], and the final state, or states [batch, length, ...].
    """
    if fresh is None:
        fresh = jax.tree.map(jnp.zeros_like, state)
    choose = lambda mask, a, b: jax.tree.map(
        lambda x, y: jnp.where(mask.reshape(-1, *(1,) * (x.ndim - 1)), x, y), a, b
    )

    def one(state, token):
        x, real, begins = token
        before = state if begins is None else choose(begins, fresh, state)
        after, y = step(before, x)
        after = after if real is None else choose(real, after, before)
        return after, (y, after if every else None)

    first = lambda tree: jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), tree)
    last = lambda tree: jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), tree)
    state, (y, states) = jax.lax.scan(one, state, first((inputs, bounds.real, bounds.begins)))
    return last(y), last(states) if every else state
