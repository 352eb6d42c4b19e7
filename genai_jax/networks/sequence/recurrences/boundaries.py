"""Which tokens of a row are padding, and where its documents begin."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from genai_jax.networks.sequence.mixers.protocol import TokenContext


class Boundaries(NamedTuple):
    """What a recurrence must know of the tokens of a row.

    Attributes:
      real: [batch, length] bool, False for padding, which leaves the state as it is; None: no
        padding.
      begins: [batch, length] bool, True where a document begins, before which the state is emptied;
        None: one document.
    """

    real: jax.Array | None = None
    begins: jax.Array | None = None


def boundaries(context: TokenContext, continued: bool) -> Boundaries:
    """The boundaries of a call of a mixer; `continued` is whether it was given a state."""
    if continued:  # segments are not used
        if context.lengths is None:
            return Boundaries()
        return Boundaries(jnp.arange(context.positions.shape[1]) < context.lengths[:, None])
    ids = context.segment_ids
    if ids is None:
        return Boundaries(context.real)
    latest = jax.lax.associative_scan(lambda old, new: jnp.where(new == 0, old, new), ids, axis=1)
    previous = jnp.pad(latest, ((0, 0), (1, 0)))[:, :-1]  # of the real tokens; 0 if there is none
    real = context.real
    return Boundaries(real, real & (previous != 0) & (ids != previous))


def masked(values: jax.Array, real: jax.Array | None, fill: float = 0.0) -> jax.Array:
    """Values [batch, length, ...] with `fill` where a token is padding."""
    if real is None:
        return values
    return jnp.where(real.reshape(*real.shape, *(1,) * (values.ndim - 2)), values, fill)
