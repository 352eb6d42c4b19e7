"""What a router should do besides lowering the loss: use all experts, keep its logits small."""

import jax
import jax.numpy as jnp

from genai_jax.networks.experts.config import MoeConfig
from genai_jax.networks.experts.router import RouterSums


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
    loss = config.load_balance * load_balance + config.router_z_loss * router_z
    return loss, {f"moe/{name}": value for name, value in metrics.items()}
