"""Experts that choose their tokens (Zhou et al. 2022, "Mixture-of-experts with expert choice")."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from genai_jax.networks.experts.config import MoeConfig
from genai_jax.networks.layers.dense import activate


class Chosen(NamedTuple):
    """The tokens of each expert.

    Attributes:
      place: of the tokens in their row, [batch, experts, capacity].
      weight: of what the expert computes, of the same shape; 0 where a row has too few tokens.
      probability: scores of the tokens that sum to 1 over experts, [batch, length, experts].
    """

    place: jax.Array
    weight: jax.Array
    probability: jax.Array


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
    if config.score == "softmax":
        probability = score = jax.nn.softmax(logits)
    else:
        score = jax.nn.sigmoid(logits)
        probability = score / jnp.sum(score, -1, keepdims=True)
    preference = jnp.where(real[..., None], jax.lax.stop_gradient(score), -1.0)
    capacity = _taken(logits.shape[1], config)
    place = jax.lax.top_k(jnp.swapaxes(preference, 1, 2), capacity)[1]
    weight = jnp.take_along_axis(jnp.swapaxes(score, 1, 2), place, 2)
    taken = _taken(jnp.sum(real, 1, dtype=jnp.int32), config)[:, None, None]
    return Chosen(place, jnp.where(jnp.arange(capacity) < taken, weight, 0.0), probability)


def _taken(tokens, config: MoeConfig):
    """Tokens that an expert takes of so many: an integer, or an array of them."""
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
    weighted = (out.astype(jnp.float32) * chosen.weight[..., None]).reshape(batch, -1, width)
    add = lambda place, out: jnp.zeros((length, width), jnp.float32).at[place].add(out)
    return jax.vmap(add)(flat[..., 0], weighted).astype(x.dtype)
