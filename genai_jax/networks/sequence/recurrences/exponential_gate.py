"""The matrix memory of the mLSTM: linear attention whose input gate is an exponential."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from genai_jax.networks.sequence.recurrences.boundaries import Boundaries, masked
from genai_jax.networks.sequence.recurrences.chunks import chunks_of, merge, split

CHUNK = 32
NEVER = -1e30  # the logarithm of a gate that is closed


class Memory(NamedTuple):
    """The state, divided by exp(scale) so that no exponential overflows.

    Attributes:
      matrix: [batch, heads, keys, values].
      normalizer: [batch, heads, keys].
      scale: [batch, heads].
    """

    matrix: jax.Array
    normalizer: jax.Array
    scale: jax.Array

    @classmethod
    def empty(cls, batch: int, heads: int, keys: int, values: int) -> "Memory":
        zeros = jnp.zeros
        return cls(zeros((batch, heads, keys, values)), zeros((batch, heads, keys)),
                   zeros((batch, heads)))  # fmt: skip


def memory_read(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_input: jax.Array,
    log_forget: jax.Array,
    state: Memory,
    bounds: Boundaries = Boundaries(),  # noqa: B008 (immutable)
    chunk: int = CHUNK,
) -> tuple[jax.Array, Memory]:
    """The memory read by queries, chunk by chunk (Beck et al. 2024, equations 19 to 27).

    C_t = f_t C_{t-1} + i_t k_t v_t^T; n_t = f_t n_{t-1} + i_t k_t;
    y_t = C_t^T q_t / max(|n_t . q_t|, 1).

    Args:
      q, k: [batch, length, heads, keys]; keys already divided by the root of their size.
      v: [batch, length, heads, values].
      log_input, log_forget: [batch, length, heads], log i (any value) and log f (at most 0).
      state: before the first token.
      bounds: padding, and where documents begin.
      chunk: tokens that are computed in parallel.

    Returns:
      y [batch, length, heads, values] and the final state, float32.
    """
    length, size = q.shape[1], min(chunk, q.shape[1])
    padded = -length % size  # which must not be written
    real = jnp.ones(q.shape[:2], bool) if bounds.real is None else bounds.real
    parts = chunks_of(bounds, *q.shape[:2], size)
    log_input = masked(log_input.astype(jnp.float32), real, NEVER)
    log_input = jnp.pad(log_input, ((0, 0), (0, padded), (0, 0)), constant_values=NEVER)
    log_forget = masked(log_forget.astype(jnp.float32), real)
    total = parts.sums(split(log_forget, size))
    arrays = (split(a.astype(jnp.float32), size) for a in (q, k, v, log_input))
    q, k, v, log_input, total = (jnp.moveaxis(a, 3, 2) for a in (*arrays, total))
    pairs = parts.pairs[:, :, None]
    gates = jnp.where(pairs, total[..., :, None] - total[..., None, :] + log_input[..., None, :],
                      NEVER)  # fmt: skip
    inherited = jnp.where(parts.from_state[:, :, None], total, NEVER)
    scores = jnp.einsum("bnhik,bnhjk->bnhij", q, k)
    written = jnp.where(parts.to_state[:, :, None], total[..., -1:] - total + log_input, NEVER)
    carried = jnp.where(parts.carries[:, :, None], total[..., -1], NEVER)

    def step(state, chunk):
        q, k, v, scores, gates, inherited, written, carried = chunk
        inherited = inherited + state.scale[..., None]
        scale = jnp.maximum(jnp.max(gates, -1), inherited)
        weights = scores * jnp.exp(gates - scale[..., None])
        before = jnp.exp(inherited - scale)[..., None]
        above = weights @ v + before * (q @ state.matrix)
        below = jnp.sum(weights, -1) + before[..., 0] * jnp.einsum(
            "bhik,bhk->bhi", q, state.normalizer
        )
        y = above / jnp.maximum(jnp.abs(below), jnp.exp(-scale))[..., None]
        new_scale = jnp.maximum(carried + state.scale, jnp.max(written, -1))
        new_scale = jnp.maximum(new_scale, NEVER / 2)  # of a chunk of padding after nothing
        keep = jnp.exp(carried + state.scale - new_scale)[..., None]
        k = k * jnp.exp(written - new_scale[..., None])[..., None]
        return Memory(
            keep[..., None] * state.matrix + k.swapaxes(-1, -2) @ v,
            keep * state.normalizer + jnp.sum(k, -2),
            new_scale,
        ), y

    each = (q, k, v, scores, gates, inherited, written, carried)
    state, y = jax.lax.scan(step, state, jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), each))
    y = jnp.moveaxis(jnp.moveaxis(y, 0, 1), 2, 3)
    return merge(y, length), state


def memory_step(state: Memory, inputs: tuple[jax.Array, ...]) -> tuple[Memory, jax.Array]:
    """The same for one token of each row, for `loop`; inputs are those of `memory_read`."""
    q, k, v, log_input, log_forget = (a.astype(jnp.float32) for a in inputs)
    scale = jnp.maximum(log_forget + state.scale, log_input)
    keep = jnp.exp(log_forget + state.scale - scale)[..., None]
    k = k * jnp.exp(log_input - scale)[..., None]
    matrix = keep[..., None] * state.matrix + k[..., :, None] * v[..., None, :]
    normalizer = keep * state.normalizer + k
    below = jnp.abs(jnp.einsum("bhk,bhk->bh", q, normalizer))
    y = jnp.einsum("bhk,bhkv->bhv", q, matrix) / jnp.maximum(below, jnp.exp(-scale))[..., None]
    return Memory(matrix, normalizer, scale), y
