"""Latent vectors that read a source of any length (Jaegle et al. 2021, "Perceiver")."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from genai_jax.networks.layers.dense import Norm
from genai_jax.networks.layers.positions import sinusoidal
from genai_jax.networks.sequence.config import TransformerConfig
from genai_jax.networks.sequence.cross_attention import CrossAttention

PARTITION_RULES = (
    (r"reader/latents", (None, "embed")),
    *((rf"reader/attend/{path}", axes) for path, axes in CrossAttention.PARTITION_RULES),
    (r"reader/\w+_norm/(scale|bias)", ("embed",)),
)


class LatentReader(nn.Module):
    """Learned vectors that attend to a source once; what follows costs as much for any length.

    Attributes:
      config: shapes of the attention; one of 1 layer.
      count: number of latent vectors.
      backend: backend of the kernels.
      dtype: dtype of matmuls and activations.
    """

    config: TransformerConfig
    count: int
    backend: str = "auto"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, positions: jax.Array, segment_ids: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The latents after reading, [batch, count, embed_dim], and their ids, [batch, count].

        The source of a row is one segment, 1; the ids are 0 in rows without a source.

        Args:
          x: vectors of the source, [batch, source_length, embed_dim].
          positions: [batch, source_length]; added as sinusoids, since the latents have no place.
          segment_ids: [batch, source_length], 1, or 0 for padding.
        """
        width = self.config.embed_dim
        init = nn.initializers.normal(1.0)
        latents = self.param("latents", init, (self.count, width), jnp.float32)
        latents = jnp.broadcast_to(latents.astype(self.dtype), (len(x), self.count, width))
        x = x + sinusoidal(positions, width).astype(x.dtype)
        norm = lambda name: Norm(self.config.norm, dtype=self.dtype, name=name)
        attend = CrossAttention(self.config, self.backend, self.dtype, name="attend")
        ids = jnp.broadcast_to(jnp.max(segment_ids, 1, keepdims=True), latents.shape[:2])
        keys, values = attend.keys_and_values(norm("source_norm")(x))
        read = attend(norm("latent_norm")(latents), keys, values, (ids, segment_ids))
        return latents + read, ids
