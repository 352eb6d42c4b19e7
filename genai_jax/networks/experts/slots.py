"""A partial matching of tokens and slots, and what moves rows along it.

Rows are moved by index, forward and back by gathers only, and never by one-hot arrays [tokens,
experts, capacity].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


def one_hot(choice: jax.Array, count: int) -> jax.Array:
    """[..., count] bool; the compiler fuses it into the sum that consumes it."""
    return choice[..., None] == jnp.arange(count)


class Places(NamedTuple):
    """Which choice fills which slot. Choices are numbered choice x tokens + token."""

    source: jax.Array  # [slots] int32: the choice in a slot; tokens x choices if it is empty
    slot: jax.Array  # [choices, tokens] int32: the slot of a choice; `slots` if it has none


def assign(bucket: jax.Array, buckets: int, capacity: int | None) -> Places:
    """Gives each choice a slot of its bucket: first choices first, and among them first tokens.

    Args:
      bucket: [tokens, choices] int32 in [0, buckets]; `buckets` marks a choice without a slot.
      buckets: number of buckets.
      capacity: slots of a bucket, which begin at bucket x capacity. If None, there is a slot for
        every choice and the buckets follow each other without gaps.
    """
    tokens, choices = bucket.shape
    total = tokens * choices
    bucket = bucket.T.reshape(-1)
    rank, sizes = ranks(bucket, buckets)
    starts = jnp.cumsum(sizes) - sizes
    order = _stable_order(bucket, buckets)
    if capacity is None:
        slot = rank + jnp.sum(jnp.where(one_hot(bucket, buckets), starts, 0), -1)
        slot = jnp.where(bucket < buckets, slot, total)
        source = jnp.where(jnp.arange(total) < jnp.sum(sizes), order, total)
        return Places(source, slot.reshape(choices, tokens))
    fits = (rank < capacity) & (bucket < buckets)
    slot = jnp.where(fits, bucket * capacity + rank, buckets * capacity)
    order = jnp.append(order, jnp.full(capacity, total, jnp.int32))
    source = jax.vmap(lambda start: jax.lax.dynamic_slice(order, (start,), (capacity,)))(starts)
    source = jnp.where(jnp.arange(capacity) < sizes[:, None], source, total)
    return Places(source.reshape(-1), slot.reshape(choices, tokens))


def ranks(bucket: jax.Array, buckets: int, block: int = 256) -> tuple[jax.Array, jax.Array]:
    """Each entry's rank among the equal entries of bucket [entries], and the size of each bucket.

    Counted in blocks by a triangular matmul: sorting twice costs more, to run and to compile.
    An entry equal to `buckets` is not counted.
    """
    entries = bucket.shape[0]
    block = min(block, entries)  # few enough that float32 holds the sums, and bfloat16 the ones
    padded = jnp.pad(bucket, (0, -entries % block), constant_values=buckets)
    ones = one_hot(padded.reshape(-1, block), buckets).astype(jnp.bfloat16)
    earlier = jnp.tri(block, k=-1, dtype=jnp.bfloat16)
    within = jnp.einsum("ij,bje->bie", earlier, ones, preferred_element_type=jnp.float32)
    of_block = jnp.sum(ones, 1, dtype=jnp.float32).astype(jnp.int32)
    before = jnp.cumsum(of_block, 0) - of_block
    rank = (within.astype(jnp.int32) + before[:, None]) * ones.astype(jnp.int32)
    return jnp.sum(rank, -1).reshape(-1)[:entries], jnp.sum(of_block, 0)


def _stable_order(bucket: jax.Array, buckets: int) -> jax.Array:
    """The stable argsort of bucket [entries], whose values are at most `buckets`."""
    entries = bucket.shape[0]
    number = jnp.arange(entries, dtype=jnp.int32)
    if (buckets + 1) * entries >= 2**31:
        return jnp.argsort(bucket, stable=True).astype(jnp.int32)
    # One operand and no ties: twice as fast to compile for TPUs.
    return jax.lax.sort(bucket * entries + number, is_stable=False) % entries


@jax.custom_vjp
def to_slots(tokens: jax.Array, places: Places) -> jax.Array:
    """[tokens, embed] -> [slots, embed]; 0 where a slot is empty. The transpose of `to_tokens`."""
    count = tokens.shape[0]
    empty = places.source >= places.slot.size
    index = jnp.where(empty, count, places.source % count)
    return tokens.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def to_tokens(rows: jax.Array, places: Places) -> jax.Array:
    """[slots, embed] -> [tokens, embed], each token the sum of its slots, in float32."""
    mine = rows.at[places.slot].get(mode="fill", fill_value=0)
    return jnp.sum(mine, 0, dtype=jnp.promote_types(rows.dtype, jnp.float32)).astype(rows.dtype)


# Derived by jax, the transpose of either gather would be a scatter.
to_slots.defvjp(
    lambda tokens, places: (to_slots(tokens, places), places),
    lambda places, grad: (to_tokens(grad, places), None),
)
to_tokens.defvjp(
    lambda rows, places: (to_tokens(rows, places), places),
    lambda places, grad: (to_slots(grad, places), None),
)


@jax.custom_vjp
def weights_of_slots(weight: jax.Array, places: Places) -> jax.Array:
    """[tokens, choices] -> [slots]; 0 where a slot is empty."""
    return jnp.append(weight.T.reshape(-1), 0)[places.source]


weights_of_slots.defvjp(
    lambda weight, places: (weights_of_slots(weight, places), places),
    lambda places, grad: (jnp.append(grad, 0)[places.slot].T, None),
)
