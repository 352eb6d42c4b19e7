"""The block of a transformer: a mixer and an MLP, or a mixture of experts."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from genai_jax.networks.experts.config import MoeConfig
from genai_jax.networks.experts.mixture import MixtureOfExperts
from genai_jax.networks.layers.dense import Mlp, Norm
from genai_jax.networks.parallel.axes import ParallelConfig
from genai_jax.networks.sequence.config import TransformerConfig
from genai_jax.networks.sequence.mixers import load_mixer, parameter_name
from genai_jax.networks.sequence.mixers.protocol import State, TokenContext


class Block(nn.Module):
    """A mixer and an MLP, each a residual branch normalized before (pre) or after it (post).

    The MLP may be a mixture of experts, whose routers write their collection "router".
    """

    config: TransformerConfig
    mixer: str = "attention"
    backend: str = "auto"
    dtype: jnp.dtype = jnp.float32
    parallel: ParallelConfig = ParallelConfig()
    moe: MoeConfig = MoeConfig()

    @nn.compact
    def __call__(
        self, x: jax.Array, state: State | None, context: TokenContext
    ) -> tuple[jax.Array, State | None]:
        c, name = self.config, parameter_name(self.mixer)
        pre = c.norm_placement == "pre"
        dropout = nn.Dropout(c.dropout, deterministic=not self.has_rng("dropout"))
        mixer_norm = Norm(c.norm, dtype=self.dtype, name=f"{name}_norm")
        mix = load_mixer(self.mixer)(
            config=c, backend=self.backend, dtype=self.dtype, parallel=self.parallel, name=name
        )
        update, new_state = mix(mixer_norm(x) if pre else x, context, state)
        x = x + dropout(update)
        if not pre:
            x = mixer_norm(x)
        if c.mlp_width or self.moe.num_experts:
            x = self._add_mlp(x, context, dropout, dropless=state is not None)
        return nn.with_logical_constraint(x, ("batch", "length", "activation_embed")), new_state

    def _add_mlp(
        self, x: jax.Array, context: TokenContext, dropout: nn.Dropout, dropless: bool
    ) -> jax.Array:
        pre = self.config.norm_placement == "pre"
        mlp_norm = Norm(self.config.norm, dtype=self.dtype, name="mlp_norm")
        update = self._mlp(mlp_norm(x) if pre else x, context, dropless)
        x = x + dropout(update)
        return x if pre else mlp_norm(x)

    def _mlp(self, x: jax.Array, context: TokenContext, dropless: bool) -> jax.Array:
        c, out_scale = self.config, 1 / (2 * self.config.num_layers)
        if not self.moe.num_experts:
            mlp = Mlp(c.mlp_width, c.activation, c.use_bias, out_scale, self.dtype, name="mlp")
            return mlp(x)
        experts = MixtureOfExperts(
            self.moe, c.mlp_width, c.activation, out_scale, c.width_growth, self.dtype, name="mlp"
        )
        return experts(x, context.real, dropless=dropless)
