"""Linear attention with a decay: a state of one matrix per head, written by keys and values."""

import jax
import jax.numpy as jnp

from genai_jax.networks.sequence.recurrences.boundaries import Boundaries, masked
from genai_jax.networks.sequence.recurrences.chunks import between_chunks, chunks_of, merge, split

CHUNK = 64
CHUNK_BY_CHANNEL = 16  # decays of channels: a chunk costs its square for each channel


def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    state: jax.Array,
    bounds: Boundaries = Boundaries(),  # noqa: B008 (immutable)
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """S_t = diag(decay_t) S_{t-1} + k_t v_t^T, y_t = S_t^T q_t, chunk by chunk.

    With one decay per head this is the state-space duality of Mamba-2 (Dao and Gu 2024, section
    6); with one per key channel, gated linear attention (Yang et al. 2024a, section 4).

    Args:
      q, k: [batch, length, heads, keys].
      v: [batch, length, heads, values].
      log_decay: [batch, length, heads] or [batch, length, heads, keys], at most 0.
      state: [batch, heads, keys, values], S before the first token.
      bounds: padding, and where documents begin.
      chunk: tokens that are computed in parallel.

    Returns:
      y [batch, length, heads, values] and the final state, float32.
    """
    by_channel = log_decay.ndim == 4
    size = min(chunk or (CHUNK_BY_CHANNEL if by_channel else CHUNK), q.shape[1])
    parts = chunks_of(bounds, *q.shape[:2], size)
    k, log_decay = masked(k, bounds.real), masked(log_decay, bounds.real)
    length = q.shape[1]
    q, k, v, log_decay = (split(a.astype(jnp.float32), size) for a in (q, k, v, log_decay))
    total = parts.sums(log_decay)
    pairs = parts.pairs[..., None]
    if by_channel:
        difference = total[:, :, :, None] - total[:, :, None]
        weight = jnp.exp(jnp.where(pairs[..., None], difference, -jnp.inf))
        scores = jnp.sum(q[:, :, :, None] * k[:, :, None] * weight, -1)
        until, after = jnp.exp(total), parts.until_end(total)
        carried = jnp.exp(total[:, :, -1])[..., None]
    else:
        difference = total[:, :, :, None] - total[:, :, None]
        weight = jnp.exp(jnp.where(pairs, difference, -jnp.inf))
        scores = jnp.einsum("bnihk,bnjhk->bnijh", q, k) * weight
        until, after = jnp.exp(total)[..., None], parts.until_end(total)[..., None]
        carried = jnp.exp(total[:, :, -1])[..., None, None]
    y = jnp.einsum("bnijh,bnjhv->bnihv", scores, v)
    new = jnp.einsum("bnjhk,bnjhv->bnhkv", k * after, v)
    carried = jnp.where(parts.carries[:, :, None, None, None], carried, 0)
    before, state = between_chunks(carried, new, state)
    read = jnp.where(parts.from_state[..., None, None], q * until, 0)
    y = y + jnp.einsum("bnihk,bnhkv->bnihv", read, before)
    return merge(y, length), state


def linear_attention_step(state: jax.Array, inputs: tuple[jax.Array, ...]):
    """The same for one token of each row, for `loop`; inputs are (q, k, v, log_decay)."""
    q, k, v, log_decay = (a.astype(jnp.float32) for a in inputs)
    decay = jnp.exp(log_decay)
    decay = decay[..., None, None] if decay.ndim == 2 else decay[..., None]
    state = decay * state + k[..., :, None] * v[..., None, :]
    return state, jnp.einsum("bhk,bhkv->bhv", q, state)
