"""Decoding state: what a stack remembers between calls, and the state of a recurrent mixer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PyTree = Any


class StackState(NamedTuple):
    """The states of all layers of a stack.

    One entry per place in the period of the pattern, whose arrays are those of its mixer's state
    stacked over periods: [layers / period, batch, ...].
    """

    places: tuple

    def select(self, rows: jax.Array) -> "StackState":
        """The state of rows [new_batch], in that order, as beam search reorders them."""
        return StackState(tuple(jax.vmap(lambda s: s.select(rows))(p) for p in self.places))

    def rewind(self, lengths: jax.Array) -> "StackState":
        """The state after only the first lengths [batch] tokens, as in speculative decoding.

        Raises:
          ValueError: a layer whose state keeps no past.
        """
        return StackState(tuple(jax.vmap(lambda s: s.rewind(lengths))(p) for p in self.places))


class RecurrentState(NamedTuple):
    """The value of a recurrence after the tokens of each row, and its last few earlier values.

    It can be rewound by as many tokens as it keeps earlier values: `rewind` of `empty`.

    Attributes:
      values: a pytree of float arrays [batch, rewind + 1, ...]; the value after t tokens is at
        t % (rewind + 1).
      length: [batch] int32, tokens of each row so far.
    """

    values: PyTree
    length: jax.Array

    @classmethod
    def empty(cls, value: PyTree, rewind: int = 0) -> "RecurrentState":
        """The state before the first token, whose value is arrays [batch, ...]."""
        batch = jax.tree.leaves(value)[0].shape[0]
        keep = lambda a: jnp.zeros((batch, rewind + 1, *a.shape[1:]), a.dtype).at[:, 0].set(a)
        return cls(jax.tree.map(keep, value), jnp.zeros(batch, jnp.int32))

    @property
    def value(self) -> PyTree:
        """The value after all tokens so far: arrays [batch, ...]."""
        rows = jnp.arange(self.length.shape[0])
        return jax.tree.map(lambda a: a[rows, self.length % a.shape[1]], self.values)

    @property
    def keeps_past(self) -> bool:
        """Whether it can be rewound."""
        return jax.tree.leaves(self.values)[0].shape[1] > 1

    def finish(self, value: PyTree, lengths: jax.Array | int) -> "RecurrentState":
        """The state whose value is that after `lengths` new tokens, if it keeps no earlier ones."""
        keep = lambda old, new: new[:, None].astype(old.dtype)
        lengths = jnp.broadcast_to(jnp.asarray(lengths, jnp.int32), self.length.shape)
        return RecurrentState(jax.tree.map(keep, self.values, value), self.length + lengths)

    def advance(self, after: PyTree, lengths: jax.Array | None = None) -> "RecurrentState":
        """The state with new tokens added.

        Args:
          after: values after each new token, arrays [batch, new, ...].
          lengths: [batch] real tokens among the new ones, which come first; all if None. The values
            after padding are ignored.
        """
        batch, new = jax.tree.leaves(after)[0].shape[:2]
        lengths = jnp.full(batch, new, jnp.int32) if lengths is None else lengths.astype(jnp.int32)
        total, rows = self.length + lengths, jnp.arange(batch)[:, None]
        seen = self.length[:, None] + 1 + jnp.arange(new)

        def write(values, after):
            kept = values.shape[1]
            wanted = (seen <= total[:, None]) & (seen > total[:, None] - kept)
            slot = jnp.where(wanted, seen % kept, kept)  # dropped where it is past the end
            return values.at[rows, slot].set(after.astype(values.dtype), mode="drop")

        return RecurrentState(jax.tree.map(write, self.values, after), total)

    def select(self, rows: jax.Array) -> "RecurrentState":
        return jax.tree.map(lambda a: a[rows], self)

    def rewind(self, lengths: jax.Array) -> "RecurrentState":
        """The state after only the first lengths [batch] tokens; see `State.rewind`.

        Rows that are rewound by more tokens than are kept have nan in place of a value.

        Raises:
          ValueError: no earlier values are kept at all.
        """
        kept = jax.tree.leaves(self.values)[0].shape[1]
        if kept == 1:
            raise ValueError(
                "a recurrent state that keeps no earlier values cannot be rewound: make it with "
                "`empty_state(..., rewind=N)` to go back by up to N tokens"
            )
        lengths = lengths.astype(jnp.int32)
        known = (lengths <= self.length) & (lengths > self.length - kept)
        mark = lambda a: jnp.where(known.reshape(-1, *(1,) * (a.ndim - 1)), a, jnp.nan)
        return RecurrentState(jax.tree.map(mark, self.values), lengths)
