"""Losses of two that play against each other, and their weight beside another loss."""

import jax
import jax.numpy as jnp
import optax

LOSSES = ("non_saturating", "hinge", "least_squares", "wasserstein", "relativistic")
# The verdict of a critic that cannot tell, for losses in which one verdict means something alone.
UNDECIDED = {"non_saturating": 0.0, "hinge": 0.0, "least_squares": 0.5}


def critic_loss(kind: str, real: jax.Array, fake: jax.Array) -> jax.Array:
    """What a critic minimises.

    Args:
      kind: one of LOSSES: Goodfellow et al. 2014; Lim and Ye 2017; Mao et al. 2017 with targets 0
        and 1; Arjovsky et al. 2017; Jolicoeur-Martineau 2019 with real and fake in pairs.
      real: verdicts on data, of any shape.
      fake: verdicts on what a generator made; of the same shape for "relativistic".
    """
    if kind == "non_saturating":
        return jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake))
    if kind == "hinge":
        return jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake))
    if kind == "least_squares":
        return (jnp.mean(jnp.square(real - 1)) + jnp.mean(jnp.square(fake))) / 2
    if kind == "wasserstein":
        return jnp.mean(fake) - jnp.mean(real)
    return jnp.mean(jax.nn.softplus(fake - real))


def generator_loss(kind: str, real: jax.Array | None, fake: jax.Array) -> jax.Array:
    """What a generator minimises; only "relativistic" looks at the verdicts on data."""
    if kind == "non_saturating":
        return jnp.mean(jax.nn.softplus(-fake))
    if kind == "least_squares":
        return jnp.mean(jnp.square(fake - 1)) / 2
    if kind == "relativistic":
        return jnp.mean(jax.nn.softplus(real - fake))
    return -jnp.mean(fake)


def adaptive_weight(reconstruction_gradient, adversarial_gradient) -> jax.Array:
    """Norm of one gradient over that of the other, at most 10,000 (Esser et al. 2021, equation 7).

    Both are gradients of the last layer of a decoder; so weighted, the losses pull it equally hard.
    """
    norms = map(optax.tree.norm, (reconstruction_gradient, adversarial_gradient))
    reconstruction, adversarial = norms
    return jax.lax.stop_gradient(jnp.clip(reconstruction / (adversarial + 1e-4), 0, 1e4))
