"""The gated delta rule: linear attention that replaces what a key had stored."""

import jax
import jax.numpy as jnp
import numpy as np

from genai_jax.networks.sequence.recurrences.boundaries import Boundaries, masked
from genai_jax.networks.sequence.recurrences.chunks import chunks_of, merge, split

CHUNK = 32


def delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    rate: jax.Array,
    state: jax.Array,
    bounds: Boundaries = Boundaries(),  # noqa: B008 (immutable)
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T, y_t = S_t^T q_t, chunk by chunk.

    Yang et al. 2024b (Gated DeltaNet), equation 10. Within a chunk, the values u_t that are really
    written, S_t = a_t S_{t-1} + k_t u_t^T, solve a triangular system, as each subtracts what the
    others have stored under its key.

    Args:
      q, k: [batch, length, heads, keys]; keys of length 1.
      v: [batch, length, heads, values].
      log_decay: [batch, length, heads], log a, at most 0.
      rate: [batch, length, heads], b in [0, 1].
      state: [batch, heads, keys, values], S before the first token.
      bounds: padding, and where documents begin.
      chunk: tokens that are computed in parallel.

    Returns:
      y [batch, length, heads, values] and the final state, float32.
    """
    length, size = q.shape[1], min(chunk, q.shape[1])
    parts = chunks_of(bounds, *q.shape[:2], size)
    rate, log_decay = masked(rate, bounds.real), masked(log_decay, bounds.real)
    arrays = (split(a.astype(jnp.float32), size) for a in (q, k, v, log_decay, rate))
    q, k, v, log_decay, rate = arrays
    total = parts.sums(log_decay)
    difference = total[:, :, :, None] - total[:, :, None]
    weight = jnp.exp(jnp.where(parts.pairs[..., None], difference, -jnp.inf))
    weight = jnp.moveaxis(weight, -1, 2)  # [batch, chunks, heads, i, j]
    last = parts.until_end(total)
    q, k, v, total, rate, last = (jnp.moveaxis(a, 3, 2) for a in (q, k, v, total, rate, last))
    until = jnp.where(parts.from_state[:, :, None], jnp.exp(total), 0)[..., None]
    overlap = jnp.tril(jnp.einsum("bnhik,bnhjk->bnhij", k, k) * weight, -1)
    right = jnp.concatenate([rate[..., None] * v, rate[..., None] * until * k], -1)
    solved = unit_inverse(rate[..., None] * overlap) @ right
    from_values, from_state = jnp.split(solved, [v.shape[-1]], -1)
    scores = jnp.einsum("bnhik,bnhjk->bnhij", q, k) * weight
    carried = jnp.where(parts.carries[:, :, None], jnp.exp(total[..., -1]), 0)[..., None, None]

    def step(state, chunk):
        from_values, from_state, scores, read, written, carried = chunk
        u = from_values - from_state @ state
        return carried * state + written.swapaxes(-1, -2) @ u, read @ state + scores @ u

    each = (from_values, from_state, scores, q * until, k * last[..., None], carried)
    state, y = jax.lax.scan(step, state, jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), each))
    y = jnp.moveaxis(jnp.moveaxis(y, 0, 1), 2, 3)  # [batch, chunks, size, heads, values]
    return merge(y, length), state


@jax.custom_jvp
def unit_inverse(lower: jax.Array) -> jax.Array:
    """(I + lower)^-1, for strictly lower triangular matrices [..., n, n].

    The inverse of blocks on the diagonal, of twice the size each time, from that of their halves:
    log2(n) - 1 pairs of matmuls, as exact as substitution row by row. On CPUs, jax 0.10 can wait
    forever for triangular systems if a program solves several at once.
    """
    size = lower.shape[-1]

    def between(block):
        """What is below the diagonal in blocks of twice the size, and in none of their halves."""
        row, column = np.indices((size, size)) // block
        return jnp.where((row % 2 == 1) & (column == row - 1), lower, 0)

    inverse, block = jnp.eye(size) - between(1), 2
    with jax.default_matmul_precision("highest"):
        while block < size:
            inverse -= inverse @ between(block) @ inverse
            block *= 2
    return inverse


@unit_inverse.defjvp
def _unit_inverse_jvp(primals, tangents):
    inverse = unit_inverse(*primals)
    with jax.default_matmul_precision("highest"):
        return inverse, -(inverse @ jnp.tril(*tangents, -1) @ inverse)


def delta_rule_step(state: jax.Array, inputs: tuple[jax.Array, ...]):
    """The same for one token of each row, for `loop`; inputs are (q, k, v, log_decay, rate)."""
    q, k, v, log_decay, rate = (a.astype(jnp.float32) for a in inputs)
    state = jnp.exp(log_decay)[..., None, None] * state
    stored = jnp.einsum("bhk,bhkv->bhv", k, state)
    state = state + k[..., :, None] * (rate[..., None] * (v - stored))[..., None, :]
    return state, jnp.einsum("bhk,bhkv->bhv", q, state)
