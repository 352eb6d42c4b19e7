"""Rows cut into chunks: what recurrences with matrix-valued states compute in parallel."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from genai_jax.networks.sequence.recurrences.boundaries import Boundaries


class Chunks(NamedTuple):
    """Which tokens of a chunk depend on which, and on the state before the chunk.

    Attributes:
      pairs: [batch, chunks, size, size] bool, whether token i depends on token j: j <= i in the
        same document.
      from_state: [batch, chunks, size] bool, whether a token continues the document that the state
        before the chunk belongs to.
      to_state: [batch, chunks, size] bool, whether a token enters the state after the chunk.
    """

    pairs: jax.Array
    from_state: jax.Array
    to_state: jax.Array

    @property
    def carries(self) -> jax.Array:
        """[batch, chunks] bool, whether the state before a chunk enters that after it."""
        return self.from_state[:, :, -1]

    def sums(self, values: jax.Array) -> jax.Array:
        """Running sums of [batch, chunks, size, ...] that begin with a chunk or document.

        What other documents add would only cost precision: differences of sums are what counts.
        """
        pairs = self.pairs.astype(values.dtype)
        return jnp.einsum("bkij,bkj...->bki...", pairs, values, precision="highest")

    def until_end(self, total: jax.Array) -> jax.Array:
        """Decay of what each token wrote until its chunk ends, from `sums` of log decays.

        0 for tokens of documents that end before; no difference to the sum of another document is
        exponentiated, which would overflow, and have a gradient that is not a number.
        """
        enters = self.to_state.reshape(*self.to_state.shape, *(1,) * (total.ndim - 3))
        return jnp.exp(jnp.where(enters, total[:, :, -1:] - total, -jnp.inf))


def split(array: jax.Array, size: int) -> jax.Array:
    """[batch, length, ...] -> [batch, chunks, size, ...], padded with zeros at the end."""
    array = jnp.pad(array, ((0, 0), (0, -array.shape[1] % size), *((0, 0),) * (array.ndim - 2)))
    return array.reshape(array.shape[0], -1, size, *array.shape[2:])


def merge(array: jax.Array, length: int) -> jax.Array:
    """The inverse of `split`."""
    return array.reshape(array.shape[0], -1, *array.shape[3:])[:, :length]


def chunks_of(bounds: Boundaries, batch: int, length: int, size: int) -> Chunks:
    """The chunks of rows; padding must leave the state as it is by its own inputs."""
    begins = jnp.zeros((batch, length), bool) if bounds.begins is None else bounds.begins
    begins = split(begins, size)
    document = jnp.cumsum(begins, 2)  # within the chunk; 0 continues
    causal = jnp.tril(jnp.ones((size, size), bool))
    return Chunks(
        (document[..., :, None] == document[..., None, :]) & causal,
        document == 0,
        document == document[:, :, -1:],
    )


def between_chunks(
    decay: jax.Array, new: jax.Array, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The states before each chunk, [batch, chunks, ...], and the final state [batch, ...].

    Args:
      decay: [batch, chunks, ...], of the state over a chunk; broadcasts against `new`.
      new: [batch, chunks, ...], what a chunk adds.
      state: [batch, ...], before the first chunk.
    """

    def step(state, chunk):
        decay, new = chunk
        return decay * state + new, state

    first = lambda a: jnp.moveaxis(a, 1, 0)
    state, before = jax.lax.scan(step, state, (first(decay), first(new)))
    return jnp.moveaxis(before, 0, 1), state
