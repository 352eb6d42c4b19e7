"""Which blocks of rows overlap which groups, for group sizes known only at run time.

Rows are sorted by group, so a block of rows overlaps a run of groups, and a group a run of blocks.
The overlapping (block, group) pairs, in row order, are the visits: at most as many as there are
blocks and groups together, however uneven the groups. Every backend of the grouped matmul iterates
over this list.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class GroupVisits(NamedTuple):
    """One entry per visit, int32 [visits]; entries from `count` [1] on are empty and repeat the
    last block.

    A visit pairs the rows [start, stop), which lie within block `block`, with group `group`.
    """

    block: jax.Array
    group: jax.Array
    start: jax.Array
    stop: jax.Array
    count: jax.Array


def group_visits(group_sizes, rows: int, block: int, *, empty: str | None = None) -> GroupVisits:
    """The visits of `rows` rows in blocks of `block`.

    empty: what to visit in addition, with start == stop: "rows": each block that no group reaches
    (after all others, with the last group); "groups": each group without rows (in order, at a
    nearby block).
    """
    groups = group_sizes.shape[0]
    blocks = -(-rows // block)
    sizes = group_sizes.astype(jnp.int32)
    stop = jnp.minimum(jnp.cumsum(sizes), rows)
    start = jnp.concatenate([jnp.zeros(1, jnp.int32), stop[:-1]])
    first = jnp.minimum(start // block, blocks - 1)
    last = jnp.maximum(stop - 1, 0) // block
    visited = jnp.where(stop > start, last - first + 1, int(empty == "groups"))
    ends = jnp.cumsum(visited)
    visit = jnp.arange(blocks + groups, dtype=jnp.int32)
    owner = jnp.searchsorted(ends, visit, side="right", method="compare_all").astype(jnp.int32)
    group = jnp.minimum(owner, groups - 1)
    at = first[group] + visit - (ends - visited)[group]
    used = ends[-1]
    if empty == "rows":
        reached = jnp.where(stop[-1] > 0, last[-1] + 1, 0)
        at = jnp.where(visit < used, at, reached + visit - used)
        used = used + blocks - reached
    at = jnp.clip(at, 0, blocks - 1)
    live = owner < groups
    begin = jnp.where(live, jnp.maximum(start[group], at * block), 0)
    end = jnp.where(live, jnp.minimum(stop[group], (at + 1) * block), 0)
    return GroupVisits(at, group, begin, jnp.maximum(end, begin), used.reshape(1))
