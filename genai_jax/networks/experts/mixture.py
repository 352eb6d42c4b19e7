"""Mixture of experts: many MLPs, of which a router has few process each token."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from genai_jax.networks.experts.config import MoeConfig
from genai_jax.networks.experts.exchange import apply_experts
from genai_jax.networks.experts.expert_choice import Chosen, apply_chosen, choose
from genai_jax.networks.experts.router import Router, chosen_sums, route, router_sums
from genai_jax.networks.layers.dense import GATED, Mlp

# Parameter path -> logical axes; a stack of blocks prepends one.
PARTITION_RULES = (
    (r"router/kernel", ("embed", None)),
    (r"router/bias", (None,)),
    (r"experts/(up|gate)", ("experts", "embed", "mlp")),
    (r"experts/down", ("experts", "mlp", "embed")),
)


class MixtureOfExperts(nn.Module):
    """A router, its experts, and optionally one MLP that processes every token.

    Where the collection "router" is mutable, the router's `RouterSums` are written to it. The
    shared experts are one MLP as wide as all of them together (Dai et al. 2024, DeepSeekMoE).

    Attributes:
      config: choices of the mixture; at least one expert.
      hidden_dim: hidden width of an expert if the config leaves it open.
      activation: activation of the experts.
      out_scale: variance of the kernels `down`, times fan-in.
      width_growth: divides the router's logits and multiplies the variance of its kernel.
      dtype: dtype of the matmuls.
    """

    config: MoeConfig
    hidden_dim: int
    activation: str = "swiglu"
    out_scale: float = 1.0
    width_growth: float = 1.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, real: jax.Array | None = None, dropless: bool = False
    ) -> jax.Array:
        """[batch, length, embed] -> the same shape.

        Args:
          x: tokens.
          real: [batch, length] bool, False for padding: no expert processes it, no sum counts it.
          dropless: whether the capacity is ignored, as it must be where a token must not depend on
            the tokens beside it.

        Raises:
          ConfigError: with a capacity, a length that is not divisible into groups.
        """
        c = self.config
        hidden_dim = c.expert_dim or self.hidden_dim
        real = jnp.ones(x.shape[:2], bool) if real is None else real
        router = Router(c.num_experts, self.width_growth, bool(c.balance_rate), name="router")
        logits, bias = router(x)
        if c.routing == "expert_choice":
            out = self._by_expert_choice(x, logits, real, hidden_dim)
            return out + self._shared(x, hidden_dim) if c.shared_experts else out
        routes = route(logits, real, c, bias)
        if dropless or self.is_initializing():
            c = dataclasses.replace(c, capacity_factor=0.0, exchange_factor=0.0)
        experts = Experts(
            c, hidden_dim, self.activation, self.out_scale, self.dtype, name="experts"
        )
        out, computed = experts(x.astype(self.dtype), routes.choice, routes.weight)
        if self.is_mutable_collection("router"):
            sums = router_sums(logits, routes, real, computed)
            self.sow("router", "sums", sums, reduce_fn=lambda _, new: new, init_fn=lambda: None)
        return out + self._shared(x, hidden_dim) if c.shared_experts else out

    def _by_expert_choice(
        self, x: jax.Array, logits: jax.Array, real: jax.Array, hidden_dim: int
    ) -> jax.Array:
        chosen = choose(logits, real, self.config)
        if self.is_mutable_collection("router"):
            sums = chosen_sums(logits, chosen, real)
            self.sow("router", "sums", sums, reduce_fn=lambda _, new: new, init_fn=lambda: None)
        experts = Experts(
            self.config, hidden_dim, self.activation, self.out_scale, self.dtype, name="experts"
        )
        return experts.of_chosen(x.astype(self.dtype), chosen)

    def _shared(self, x: jax.Array, hidden_dim: int) -> jax.Array:
        shared = Mlp(
            self.config.shared_experts * hidden_dim, self.activation, False, self.out_scale,
            self.dtype, name="shared",
        )  # fmt: skip
        return shared(x)


class Experts(nn.Module):
    """MLPs without biases, each applied to the tokens that chose it."""

    config: MoeConfig
    hidden_dim: int
    activation: str = "swiglu"
    out_scale: float = 1.0
    dtype: jnp.dtype = jnp.float32

    def __call__(
        self, x: jax.Array, choice: jax.Array, weight: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Arguments and results are those of `apply_experts`."""
        kernels = self._kernels(x.shape[-1])
        return apply_experts(self.config, self.activation, kernels, x, choice, weight)

    def of_chosen(self, x: jax.Array, chosen: Chosen) -> jax.Array:
        """Arguments and results are those of `apply_chosen`."""
        return apply_chosen(self.activation, self._kernels(x.shape[-1]), x, chosen)

    @nn.compact
    def _kernels(self, width: int) -> dict[str, jax.Array]:
        shapes = {"up": (width, self.hidden_dim), "down": (self.hidden_dim, width)}
        if self.activation in GATED:
            shapes["gate"] = shapes["up"]
        return {
            name: self._kernel(name, shape).astype(self.dtype) for name, shape in shapes.items()
        }

    def _kernel(self, name: str, shape: tuple[int, int]) -> jax.Array:
        scale = self.out_scale if name == "down" else 1.0
        init = nn.initializers.variance_scaling(scale, "fan_in", "truncated_normal", batch_axis=0)
        return self.param(name, init, (self.config.num_experts, *shape), jnp.float32)
