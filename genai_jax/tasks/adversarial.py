"""Losses of a discriminator, and how much its verdict should count beside another loss."""

import jax
import jax.numpy as jnp
import optax


def hinge_loss(real: jax.Array, fake: jax.Array) -> jax.Array:
    """What a discriminator minimises (Lim and Ye 2017): real logits above 1, fake ones below -1.

    Args:
      real: logits of data, of any shape.
      fake: logits of what a generator made.
    """
    return (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake))) / 2


def adaptive_weight(reconstruction_gradient, adversarial_gradient) -> jax.Array:
    """Norm of one gradient over that of the other, at most 10,000 (Esser et al. 2021, equation 7).

    Both are gradients of the last layer of a decoder; so weighted, the losses pull it equally hard.
    """
    norms = map(optax.tree.norm, (reconstruction_gradient, adversarial_gradient))
    reconstruction, adversarial = norms
    return jax.lax.stop_gradient(jnp.clip(reconstruction / (adversarial + 1e-4), 0, 1e4))
