"""Heads for tokens further ahead, used in training alone (Gloeckle et al. 2024)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from genai_jax.networks.layers.dense import Mlp, Norm

PARTITION_RULES = (
    (r"norm/(scale|bias)", ("embed",)),
    (r"mlp/(up|gate)/kernel", ("embed", "mlp")),
    (r"mlp/down/kernel", ("mlp", "embed")),
    (r"mlp/(up|gate)/bias", ("mlp",)),
    (r"mlp/down/bias", ("embed",)),
)


class AheadHead(nn.Module):
    """A residual MLP from hidden states to those for a later token; the output embedding is shared.

    Attributes:
      hidden_dim: width of the MLP.
      activation: of the MLP.
      use_bias: whether its layers have biases.
      norm: kind of the norms before and after.
      dtype: dtype of the matmuls.
    """

    hidden_dim: int
    activation: str
    use_bias: bool = False
    norm: str = "rmsnorm"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """[batch, length, embed_dim] -> the same shape."""
        normed = Norm(self.norm, dtype=self.dtype, name="in_norm")(hidden)
        mlp = Mlp(self.hidden_dim, self.activation, self.use_bias, dtype=self.dtype, name="mlp")
        return Norm(self.norm, dtype=self.dtype, name="out_norm")(hidden + mlp(normed))


def shifted_targets(
    targets: jax.Array, loss_mask: jax.Array, segment_ids: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """The targets `count` tokens further ahead and their mask, arrays [batch, length].

    What would lie in another document or beyond the row has the mask 0.
    """
    ahead = lambda a: jnp.pad(a[:, count:], ((0, 0), (0, count)))
    same = ahead(segment_ids) == segment_ids
    return ahead(targets), ahead(loss_mask) * same
