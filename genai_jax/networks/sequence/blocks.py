"""The block of a transformer: a mixer, cross-attention in a decoder with a source, and an MLP."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from genai_jax.networks.experts.config import MoeConfig
from genai_jax.networks.experts.mixture import MixtureOfExperts
from genai_jax.networks.layers.dense import Mlp, Norm
from genai_jax.networks.parallel.axes import ParallelConfig
from genai_jax.networks.sequence.config import TransformerConfig
from genai_jax.networks.sequence.cross_attention import CrossAttention, CrossState
from genai_jax.networks.sequence.mixers import load_mixer, parameter_name
from genai_jax.networks.sequence.mixers.protocol import State, TokenContext


class Block(nn.Module):
    """A mixer and an MLP, each a residual branch normalized before (pre) or after it (post).

    With `cross`, a branch between the two sees the source in the context, or what the state has
    kept of it. The MLP may be a mixture of experts, whose routers write their collection "router".
    """

    config: TransformerConfig
    mixer: str = "attention"
    backend: str = "auto"
    dtype: jnp.dtype = jnp.float32
    parallel: ParallelConfig = ParallelConfig()
    moe: MoeConfig = MoeConfig()
    cross: bool = False

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
        own = state.own if self.cross and state is not None else state
        update, new_state = mix(mixer_norm(x) if pre else x, context, own)
        x = x + dropout(update)
        if not pre:
            x = mixer_norm(x)
        if self.cross:
            x, new_state = self._add_source(x, context, dropout, state, new_state)
        if c.mlp_width or self.moe.num_experts:
            x = self._add_mlp(x, context, dropout, dropless=state is not None)
        return nn.with_logical_constraint(x, ("batch", "length", "activation_embed")), new_state

    def _add_source(
        self, x: jax.Array, context: TokenContext, dropout: nn.Dropout, state, own: State | None
    ) -> tuple[jax.Array, CrossState | None]:
        """Attends to the source; returns the state with its keys and values."""
        pre, source = self.config.norm_placement == "pre", context.source
        norm = Norm(self.config.norm, dtype=self.dtype, name="cross_norm")
        attend = CrossAttention(self.config, self.backend, self.dtype, name="cross_attention")
        if source.hidden is None:
            keys, values = state.keys, state.values
        else:
            keys, values = attend.keys_and_values(source.hidden)
        segments = context.segment_ids
        if segments is None:
            segments = jnp.ones(x.shape[:2], jnp.int32)
        update = attend(norm(x) if pre else x, keys, values, (segments, source.segment_ids))
        x = x + dropout(update)
        return x if pre else norm(x), None if state is None else CrossState(own, keys, values)

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
