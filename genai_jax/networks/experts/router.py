"""The router: which experts a token goes to, and what a loss needs to know about it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from genai_jax.networks.experts.config import MoeConfig
from genai_jax.networks.experts.expert_choice import Chosen
from genai_jax.networks.experts.slots import one_hot
from genai_jax.networks.parallel.axes import free_axes, on_one_device, token_spec


class RouterSums(NamedTuple):
    """What a router did, summed over the tokens that are not padding; float32.

    They are sums, so that the sums over parts of a batch add up to those over the batch.
    """

    load: jax.Array  # [experts] tokens that chose an expert, dropped or not
    probability: jax.Array  # [experts] scores, normalized to sum to 1 for each token
    squared_z: jax.Array  # [] squared log-sum-exp of the logits
    entropy: jax.Array  # [] entropy of the probabilities, nats
    computed: jax.Array  # [] choices that an expert computed
    tokens: jax.Array  # [] number of tokens


class Router(nn.Module):
    """A linear map to one logit per expert, in float32, and perhaps a bias of the choices.

    Attributes:
      num_experts: number of logits.
      width_growth: divides the logits and multiplies the variance of the kernel.
      has_bias: whether there are biases; see `losses.router.balancing_term`.
    """

    num_experts: int
    width_growth: float = 1.0
    has_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """[batch, length, embed] -> logits [batch, length, experts] and biases [experts]."""
        init = nn.initializers.variance_scaling(self.width_growth, "fan_in", "truncated_normal")
        kernel = self.param("kernel", init, (x.shape[-1], self.num_experts), jnp.float32)
        # "high" keeps 16 bits of the kernel on TPU, where the default keeps 8 and "highest" costs
        # as much as a twentieth of the experts; x has 8 where it comes in bfloat16.
        logits = jnp.matmul(x.astype(jnp.float32), kernel, precision="high")
        logits = logits if self.width_growth == 1 else logits / self.width_growth
        if not self.has_bias:
            return logits, None
        return logits, self.param("bias", nn.initializers.zeros, (self.num_experts,), jnp.float32)


class Routes(NamedTuple):
    """The experts of each token, best first, and the weights of their outputs."""

    choice: jax.Array  # [batch, length, experts_per_token] int32; num_experts for padding
    weight: jax.Array  # [batch, length, experts_per_token] float32
    probability: jax.Array  # [batch, length, num_experts] float32: scores that sum to 1


def route(
    logits: jax.Array, real: jax.Array, config: MoeConfig, bias: jax.Array | None = None
) -> Routes:
    """The experts with the highest scores of each token.

    Args:
      logits: [batch, length, num_experts], float32.
      real: [batch, length] bool, False for padding.
      config: number of choices, and how logits become scores and weights.
      bias: [num_experts], added to the scores for the choice but not for the weights.
    """
    if config.score == "softmax":
        probability = score = jax.nn.softmax(logits)
    else:
        score = jax.nn.sigmoid(logits)
        probability = score / jnp.sum(score, -1, keepdims=True)
    preference = score if bias is None else score + bias
    choice = _top_indices(jax.lax.stop_gradient(preference), config.experts_per_token)
    # Not the values of top_k, whose gradient is a scatter.
    weight = jnp.sum(jnp.where(one_hot(choice, config.num_experts), score[..., None, :], 0), -1)
    if config.renormalize:
        weight = weight / jnp.maximum(jnp.sum(weight, -1, keepdims=True), 1e-20)
    choice = jnp.where(real[..., None], choice, config.num_experts)
    return Routes(choice.astype(jnp.int32), weight, probability)


def _top_indices(score: jax.Array, count: int) -> jax.Array:
    """The indices of the `count` highest of [batch, length, experts], best first."""
    top_indices = lambda score: jax.lax.top_k(score, count)[1]
    if on_one_device():
        return top_indices(score)
    # Left to itself the compiler gathers the scores of all tokens on every device.
    tokens = token_spec(score.shape)
    return jax.shard_map(
        top_indices, in_specs=tokens, out_specs=tokens, axis_names=free_axes(), check_vma=False
    )(score)


def router_sums(
    logits: jax.Array, routes: Routes, real: jax.Array, computed: jax.Array
) -> RouterSums:
    """The sums over the real tokens of a batch.

    Args:
      logits: [batch, length, experts].
      routes: the choices that follow from them.
      real: [batch, length] bool, False for padding.
      computed: [batch, length, choices] bool, which choices an expert computed.
    """
    load = jnp.sum(one_hot(routes.choice, logits.shape[-1]), (0, 1, 2), dtype=jnp.float32)
    return _sums(logits, routes.probability, real, load, jnp.sum(computed, dtype=jnp.float32))


def chosen_sums(logits: jax.Array, chosen: Chosen, real: jax.Array) -> RouterSums:
    """The same sums where experts choose their tokens.

    What is not `computed` is the share of the tokens that no expert chose.
    """
    taken = chosen.weight > 0
    load = jnp.sum(taken, (0, 2), dtype=jnp.float32)
    mark = lambda place, taken: jnp.zeros(logits.shape[1], bool).at[place].max(taken)
    reached = jax.vmap(mark)(*(a.reshape(len(a), -1) for a in (chosen.place, taken)))
    tokens = jnp.maximum(jnp.sum(real, dtype=jnp.float32), 1)
    computed = jnp.sum(load) * jnp.sum(reached, dtype=jnp.float32) / tokens
    return _sums(logits, chosen.probability, real, load, computed)


def _sums(logits, probability, real, load, computed) -> RouterSums:
    counted = real.astype(jnp.float32)
    entropy = -jnp.sum(probability * jnp.log(jnp.maximum(probability, 1e-20)), -1)
    return RouterSums(
        load=load,
        probability=jnp.sum(probability * counted[..., None], (0, 1)),
        squared_z=jnp.sum(jnp.square(jax.nn.logsumexp(logits, -1)) * counted),
        entropy=jax.lax.stop_gradient(jnp.sum(entropy * counted)),
        computed=computed,
        tokens=jnp.sum(counted),
    )


def collect_router_biases(params: Mapping[str, Any]) -> jax.Array:
    """The biases of all routers of a network, stacked as `collect_router_sums` does."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    found = [
        leaf for path, leaf in leaves if jax.tree_util.keystr(path).endswith("['router']['bias']")
    ]
    return jnp.concatenate([b if b.ndim == 2 else b[None] for b in found])


def collect_router_sums(variables: Mapping[str, Any]) -> RouterSums:
    """The sums of all routers of a network, wherever they are in it, stacked: [routers, ...].

    Args:
      variables: what `apply(..., mutable=["router"])` returned beside the output. Routers in
        scanned layers come stacked already.

    Raises:
      ValueError: no router wrote anything.
    """
    is_sums = lambda node: isinstance(node, RouterSums)
    routers = jax.tree.leaves(variables.get("router", {}), is_leaf=is_sums)
    if not routers:
        raise ValueError("no router wrote its sums: apply the network with mutable=['router']")
    stacked = [s if s.load.ndim == 2 else jax.tree.map(lambda a: a[None], s) for s in routers]
    if len(stacked) == 1:
        return stacked[0]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *stacked)
