"""Experts that choose their tokens (Zhou et al. 2022, "Mixture-of-experts with expert choice")."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from genai_jax.networks.experts.config import MoeConfig
from genai_jax.networks.layers.dense import activate


class Chosen(NamedTuple):
    """The tokens of each expert: places in a row [batch, experts, capacity], and their weights.

    A weight is 0 where a row has too few tokens for the capacity.
    """

    place: jax.Array
    weight: jax.Array


def choose(logits: jax.Array, real: jax.Array, config: MoeConfig) -> Chosen:
    """The tokens of a row that each expert prefers, by the scores of its tokens.

    Each expert takes tokens x experts_per_token / num_experts of a row, rounded up, so that all do
    the same work; a token may be chosen by any number of them. The weight is the score (Zhou et al.
    2022, section 3.2).

    Args:
      logits: [batch, length, num_experts], float32.
      real: [batch, length] bool; padding is never chosen, and does not raise what an expert takes.
      config: number of experts, and how logits become scores.
    """
    length, share = logits.shape[1], config.experts_per_token / config.num_experts
    score = jax.nn.softmax(logits) if config.score == "softmax" else jax.nn.sigmoid(logits)
    preference = jnp.where(real[..., None], jax.lax.stop_gradient(score), -1.0)
    capacity = _taken(length, config)
    place = jax.lax.top_k(jnp.swapaxes(preference, 1, 2), capacity)[1]
    weight = jnp.take_along_axis(jnp.swapaxes(score, 1, 2), place, 2)
    count = jnp.sum(real, 1)
    taken = jnp.ceil(count * share - 1e-6)[:, None, None]
    return Chosen(place, jnp.where(jnp.arange(capacity) < taken, weight, 0.0))


def _taken(tokens: int, config: MoeConfig) -> int:
    return -(-tokens * config.experts_per_token // config.num_experts)


def apply_chosen(
    activation: str, kernels: Mapping[str, jax.Array], x: jax.Array, chosen: Chosen
) -> jax.Array:
    """The weighted sum over experts of what each computes of its tokens, [batch, length, embed].

    Args:
      activation: of the experts' MLPs.
      kernels: `up`, `down` and perhaps `gate`, [experts, in, out].
      x: [batch, length, embed].
      chosen: what `choose` returned.
    """
    batch, length, width = x.shape
    flat = chosen.place.reshape(batch, -1, 1)
    rows = jnp.take_along_axis(x, flat, 1).reshape(*chosen.place.shape, width)
    by_expert = lambda rows, kernel: jnp.einsum("bnci,nio->bnco", rows, kernel)
    up = by_expert(rows, kernels["up"])
    gate = by_expert(rows, kernels["gate"]) if "gate" in kernels else None
    out = by_expert(activate(up, gate, activation), kernels["down"])
    out = (out * chosen.weight[..., None].astype(out.dtype)).reshape(batch, -1, width)
    add = lambda place, out: jnp.zeros((length, width), out.dtype).at[place].add(out)
    return jax.vmap(add)(flat[..., 0], out)
