"""From hidden states to logits."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Head(nn.Module):
    """The untied output embedding, [embed_dim, vocab_size].

    Attributes:
      vocab_size: number of logits.
      init_scale: variance of the kernel, times fan-in.
    """

    vocab_size: int
    init_scale: float = 1.0

    @nn.compact
    def __call__(self, embed_dim: int) -> jax.Array:
        init = nn.initializers.variance_scaling(self.init_scale, "fan_in", "truncated_normal")
        return self.param("kernel", init, (embed_dim, self.vocab_size), jnp.float32)


def output_logits(hidden: jax.Array, kernel: jax.Array, soft_cap: float | None) -> jax.Array:
    """Logits in float32, the matmul in the dtype of `hidden`."""
    logits = jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return soft_cap * jnp.tanh(logits / soft_cap) if soft_cap else logits
