"""Attention with a state of constant size: to a window, and to the first tokens of a document.

A decoder that was trained on whole rows breaks down when it sees only a window: every token attends
to the first ones, the sinks of attention, whatever they say (Xiao et al. 2024, "Efficient streaming
language models with attention sinks"). With a window and these it can go on for ever.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

import kernels_pallas


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["first_keys", "first_values", "keys", "values", "length", "longest"],
    meta_fields=["spare"],
)
@dataclasses.dataclass(frozen=True)
class StreamingState:
    """Keys and values of the first tokens of each row, and of the last ones; a pytree.

    Attributes:
      first_keys, first_values: [batch, sinks, kv_heads, head_dim].
      keys, values: of the last tokens, the newest last: [batch, reach + spare, kv_heads,
        head_dim].
      length: tokens of each row so far, [batch].
      longest: the most tokens that each row has had, [batch]; what came before the last
        reach + spare of those is lost.
      spare: by how many tokens it can be rewound.
    """

    first_keys: jax.Array
    first_values: jax.Array
    keys: jax.Array
    values: jax.Array
    length: jax.Array
    longest: jax.Array
    spare: int

    @classmethod
    def empty(cls, batch: int, sinks: int, reach: int, spare: int, heads: int, width: int, dtype):
        first, last = (jnp.zeros((batch, n, heads, width), dtype) for n in (sinks, reach + spare))
        none = jnp.zeros(batch, jnp.int32)
        return cls(first, first, last, last, none, none, spare)

    def select(self, rows: jax.Array) -> "StreamingState":
        return jax.tree.map(lambda a: a[rows], self)

    def rewind(self, lengths: jax.Array) -> "StreamingState":
        """See `protocol.State.rewind`.

        Rows rewound by more than `spare` tokens, or forward, get nan in place of keys and values.

        Raises:
          ValueError: no tokens are kept besides those within reach.
        """
        if not self.spare:
            raise ValueError(
                "this state keeps only the tokens within reach and cannot be rewound: make it "
                "with `empty_state(..., rewind=N)` to go back by up to N tokens"
            )
        back = (self.length - lengths)[:, None]
        places = jnp.arange(self.keys.shape[1]) - back
        known = (back >= 0) & (self.longest[:, None] - lengths[:, None] <= self.spare)
        known = known[..., None, None]
        moved = lambda a: jnp.where(known, _at(a, places), jnp.nan)
        return dataclasses.replace(
            self, keys=moved(self.keys), values=moved(self.values), length=lengths.astype(jnp.int32)
        )

    def add(self, k: jax.Array, v: jax.Array, lengths: jax.Array | None):
        """The state with new tokens, of which the first lengths [batch] are real.

        Returns:
          It, and the keys and values before them and of them, [batch, reach + spare + new, ...].
        """
        new, kept = k.shape[1], self.keys.shape[1]
        lengths = jnp.full_like(self.length, new) if lengths is None else lengths.astype(jnp.int32)
        keys, values = jnp.concatenate([self.keys, k], 1), jnp.concatenate([self.values, v], 1)
        last = jnp.arange(kept) + lengths[:, None]
        sinks = jnp.arange(self.first_keys.shape[1]) - self.length[:, None]  # among the new ones
        begins = ((sinks >= 0) & (sinks < lengths[:, None]))[..., None, None]
        state = StreamingState(
            jnp.where(begins, _at(k, sinks), self.first_keys),
            jnp.where(begins, _at(v, sinks), self.first_values),
            _at(keys, last), _at(values, last), self.length + lengths,
            jnp.maximum(self.longest, self.length + lengths), self.spare,
        )  # fmt: skip
        return state, keys, values


def attend_to_first(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    seen: jax.Array,
    scale: float | None,
    soft_cap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """Attention to a few keys for each query.

    Args:
      q: [batch, length, heads, head_dim].
      keys, values: [batch, length, sinks, kv_heads, head_dim].
      seen: which of them a query sees, [batch, length, sinks].
      scale: of the scores; 1 / sqrt(head_dim) if None.
      soft_cap: tanh cap of the scores, or None.

    Returns:
      What `kernels_pallas.merge` takes: out like q, and the log of the denominator, [batch, heads,
      length], -inf where nothing is seen.
    """
    batch, length, heads, width = q.shape
    grouped = q.reshape(batch, length, keys.shape[3], -1, width)
    scores = jnp.einsum("blkgd,blskd->blkgs", grouped, keys, preferred_element_type=jnp.float32)
    scores *= width**-0.5 if scale is None else scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(seen[:, :, None, None], scores, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.maximum(jnp.max(scores, -1, keepdims=True), -1e30))
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, -1, keepdims=True)
    share = weights / jnp.where(total == 0, 1.0, total)
    out = jnp.einsum("blkgs,blskd->blkgd", share.astype(q.dtype), values)
    lse = jnp.where(total == 0, -jnp.inf, top + jnp.log(jnp.where(total == 0, 1.0, total)))
    return out.reshape(q.shape), jnp.swapaxes(lse.reshape(batch, length, heads), 1, 2)


def stream(
    q: jax.Array, keys: jax.Array, values: jax.Array, first: tuple | None,
    segment_ids: tuple | jax.Array | None, mask: kernels_pallas.Mask, q_offset: int,
    scale: float | None, soft_cap: float | None, backend: str, bias=None,
) -> jax.Array:  # fmt: skip
    """Attention to tokens before each query, and to its first tokens.

    Args:
      q: [batch, length, heads, head_dim].
      keys, values: [batch, kv_length, kv_heads, head_dim].
      first: the first four of `attend_to_first`, whose queries are rotated as if they were near;
        None for a network without sinks.
      segment_ids: as of `kernels_pallas.attention`.
      mask: which of the keys a query sees.
      q_offset: place of the first query among the keys.
      scale: of the scores; 1 / sqrt(head_dim) if None.
      soft_cap: tanh cap of the scores, or None.
      backend: backend of `kernels_pallas`.
      bias: of the scores with `keys`, as of `kernels_pallas.attention`.
    """
    attend = functools.partial(
        kernels_pallas.attention, q, keys, values, segment_ids=segment_ids, scale=scale,
        logits_soft_cap=soft_cap, mask=mask, q_offset=q_offset, bias=bias, backend=backend,
    )  # fmt: skip
    if first is None:
        return attend()
    out, lse = attend(return_lse=True)
    return kernels_pallas.merge(out, lse, *attend_to_first(*first, scale, soft_cap))[0]


def first_of_documents(
    k: jax.Array, v: jax.Array, positions: jax.Array, segment_ids: jax.Array | None, sinks: int,
    window: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Keys and values of the first tokens of each token's document, and which of them it sees.

    A token does not see there what it sees in its window. Positions must begin with 0 in each
    document. [batch, length, sinks, kv_heads,
    head_dim], twice, and [batch, length, sinks].
    """
    numbers = jnp.arange(sinks)
    begins = jnp.arange(k.shape[1]) - positions  # where the document of each token begins
    places = begins[..., None] + numbers
    seen = (places >= 0) & (positions[..., None] - numbers > window)
    places = jnp.clip(places, 0, k.shape[1] - 1)
    if segment_ids is not None:
        other = jnp.take_along_axis(segment_ids, places.reshape(len(k), -1), 1)
        seen &= other.reshape(places.shape) == segment_ids[..., None]
    pick = lambda a: _at(a, places.reshape(len(a), -1)).reshape(*places.shape, *a.shape[2:])
    return pick(k), pick(v), seen


def _at(a: jax.Array, places: jax.Array) -> jax.Array:
    """a [batch, length, ...] at places [batch, n]; any token where there is none."""
    places = jnp.clip(places, 0, a.shape[1] - 1)
    return jnp.take_along_axis(a, places.reshape(*places.shape, *(1,) * (a.ndim - 2)), 1)
