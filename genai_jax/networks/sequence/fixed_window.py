"""A feed-forward network of the last few tokens (Bengio et al. 2003)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from genai_jax.networks.layers.dense import Dense
from genai_jax.networks.layers.embedding import Embed

# Parameter path -> logical axes.
PARTITION_RULES = (
    (r"embed/embedding", ("vocabulary", "embed")),
    (r"hidden/kernel", ("embed", "mlp")),
    (r"hidden/bias", ("mlp",)),
    (r"output/kernel", ("embed", "vocabulary")),
    (r"direct/kernel", ("embed", "vocabulary")),
    (r"output_bias", ("vocabulary",)),
)


class _Kernel(nn.Module):
    """A matrix [rows, columns] that another module multiplies by."""

    rows: int
    columns: int

    @nn.compact
    def __call__(self) -> jax.Array:
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
        return self.param("kernel", init, (self.rows, self.columns), jnp.float32)


class FixedWindow(nn.Module):
    """y = b + W x + U tanh(d + H x), with x the embeddings of the last tokens, side by side.

    Bengio et al. 2003, "A neural probabilistic language model", eq. 1. Logits are `features` times
    `head_kernel`, so that losses need not hold them all at once.

    Attributes:
      vocab_size: number of tokens.
      context: tokens that the network sees, n - 1 in the paper.
      embed_dim: width of an embedding.
      hidden_dim: units of the tanh layer.
      direct: whether there are direct connections W.
      dtype: dtype of matmuls and activations.
    """

    vocab_size: int
    context: int
    embed_dim: int
    hidden_dim: int
    direct: bool = False
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        width = self.context * self.embed_dim
        self.embed = Embed(self.vocab_size, self.embed_dim, "vocabulary", self.dtype)
        self.hidden = Dense((self.hidden_dim,), use_bias=True, dtype=self.dtype)
        self.output = _Kernel(self.hidden_dim, self.vocab_size)
        if self.direct:
            self.direct_output = _Kernel(width, self.vocab_size, name="direct")
        self.output_bias = self.param(
            "output_bias", nn.initializers.zeros, (self.vocab_size,), jnp.float32
        )

    def features(self, contexts: jax.Array) -> jax.Array:
        """What the output is linear in: [batch, length, features].

        Args:
          contexts: [batch, length, context] integers, the most recent token first; `vocab_size`
            where there is none, which is embedded as zeros.
        """
        batch, length, context = contexts.shape
        known = contexts < self.vocab_size
        index = jnp.where(known, contexts, 0).reshape(batch, length * context)
        x = self.embed(index).reshape(*contexts.shape, self.embed_dim)
        x = jnp.where(known[..., None], x, 0).reshape(batch, length, -1)
        x = nn.with_logical_constraint(x, ("batch", "length", None))
        parts = [jnp.tanh(self.hidden(x)), *([x] if self.direct else [])]
        return jnp.concatenate([*parts, jnp.ones((batch, length, 1), self.dtype)], -1)

    def head_kernel(self) -> jax.Array:
        """What features are multiplied by, [features, vocab_size], float32: U, W, and b."""
        parts = [self.output(), *([self.direct_output()] if self.direct else [])]
        return jnp.concatenate([*parts, self.output_bias[None]])

    def __call__(self, contexts: jax.Array) -> jax.Array:
        """Logits [batch, length, vocab_size] of the token after each context, float32."""
        features, kernel = self.features(contexts), self.head_kernel()
        return jnp.matmul(
            features, kernel.astype(features.dtype), preferred_element_type=jnp.float32
        )
