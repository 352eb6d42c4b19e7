"""What a router should do besides lowering the loss: use all experts, keep its logits small."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from genai_jax.networks.experts.config import MoeConfig
from genai_jax.networks.experts.router import (
    RouterSums,
    collect_router_biases,
    collect_router_sums,
)

# Factor of the gradient of biases, of which only the sign counts: the norm of all gradients, which
# is logged and clipped, stays that of the loss.
SMALL = 1e-8


def router_losses(sums: RouterSums, config: MoeConfig) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The weighted losses of the routers of all layers, and what to log about them.

    The load-balance loss is that of Fedus et al. 2022 (Switch, eq. 4) with k choices per token: the
    number of experts times the sum over experts of (share of choices x mean probability), so that
    it is 1 for a uniform router. The z-loss is the mean squared log-sum-exp of the logits (Zoph et
    al. 2022, ST-MoE, eq. 5). Both are averaged over layers.

    Args:
      sums: of every layer, over the tokens of the whole batch, stacked: [layers, ...].
      config: its weights.

    Returns:
      A float32 number to add to the loss, and metrics averaged over layers: `moe/load_balance` and
      `moe/router_z`, both unweighted; `moe/entropy` of the router, nats; `moe/dropped`, the share
      of choices that no expert computed; `moe/largest_load`, choices of the most chosen expert
      relative to the mean, of the worst layer.
    """
    choices = jnp.maximum(jnp.sum(sums.load, -1, keepdims=True), 1)
    tokens = jnp.maximum(sums.tokens, 1)
    relative_load = config.num_experts * sums.load / choices  # [layers, experts], 1 on average
    probability = sums.probability / tokens[:, None]
    load_balance = jnp.mean(jnp.sum(relative_load * probability, -1))
    router_z = jnp.mean(sums.squared_z / tokens)
    metrics = {
        "load_balance": load_balance,
        "router_z": router_z,
        "entropy": jnp.mean(sums.entropy / tokens),
        "dropped": jnp.mean(1 - sums.computed / choices[:, 0]),
        "largest_load": jnp.max(relative_load),
    }
    balance = config.load_balance if config.routing == "token_choice" else 0.0
    loss = balance * load_balance + config.router_z_loss * router_z
    return loss, {f"moe/{name}": value for name, value in metrics.items()}


def router_terms(
    written: Mapping[str, Any], params: Mapping[str, Any], config: MoeConfig
) -> tuple[jax.Array | float, dict[str, jax.Array]]:
    """What a network with experts adds to the loss of its task, and what to log; nothing without.

    Args:
      written: what the network wrote to the collection "router".
      params: of the network.
      config: of its experts.
    """
    if not config.num_experts:
        return 0.0, {}
    sums = collect_router_sums(written)
    loss, metrics = router_losses(sums, config)
    if config.balance_rate:
        loss += balancing_term(sums, collect_router_biases(params))
    return loss, metrics


def balancing_term(sums: RouterSums, biases: jax.Array) -> jax.Array:
    """A term of value 0 whose gradient by the biases has the sign of each expert's excess load.

    With `training.optimizer.moved_by_sign`, the bias of an expert that more than its share of
    tokens chose falls by a constant, and that of the others rises (Wang et al. 2024,
    "Auxiliary-loss-free load balancing strategy for mixture-of-experts", algorithm 1).

    Args:
      sums: of every layer, over the tokens of the whole batch, stacked: [layers, ...].
      biases: [layers, experts].
    """
    excess = sums.load / jnp.maximum(jnp.mean(sums.load, -1, keepdims=True), 1) - 1
    zero = biases - jax.lax.stop_gradient(biases)
    return SMALL * jnp.sum(jax.lax.stop_gradient(excess) * zero)
