"""The place of a thread block: its row block and the column blocks it visits, read at run time."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Place(NamedTuple):
    """All but groups are scalars at run time; the ranges are those of `schedule.Schedule`."""

    batch: jax.Array
    head: jax.Array  # in the grid: a query head, or a key head if rows are keys
    block: jax.Array  # row block
    start: jax.Array
    full_start: jax.Array
    full_stop: jax.Array
    stop: jax.Array
    groups: int  # number of heads whose columns are visited, head by head

    @property
    def visits(self):
        return (self.stop - self.start) * self.groups

    @property
    def partial(self):
        """Number of visits to partial blocks, over all heads; they come before the full ones."""
        return self.visits - (self.full_stop - self.full_start) * self.groups

    def column_block(self, visit):
        """(group, column block) of the visit."""
        full = self.full_stop - self.full_start
        partial = self.stop - self.start - full
        group, index = jnp.int32(0), visit
        if self.groups > 1:
            is_full = visit >= self.partial
            visit = jnp.where(is_full, visit - self.partial, visit)
            count = jnp.maximum(jnp.where(is_full, full, partial), 1)
            group = jax.lax.div(visit, count)
            index = jax.lax.rem(visit, count) + jnp.where(is_full, partial, 0)
        before = self.full_start - self.start
        late = jnp.where(index < partial, self.full_stop - before, self.full_start - partial)
        return group, index + jnp.where(index < before, self.start, late)


def find_place(refs: dict, groups: int) -> Place:
    """The place of this thread block, from its line of the schedule."""
    line = jax.lax.axis_index("line")
    numbers = (refs["schedule"][line, i] for i in range(5))
    return Place(jax.lax.axis_index("batch"), jax.lax.axis_index("head"), *numbers, groups)
