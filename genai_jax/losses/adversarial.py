"""Adversarial losses of critic and generator, and their weight relative to another loss."""

import jax
import jax.numpy as jnp
import optax

LOSSES = ("non_saturating", "hinge", "least_squares", "wasserstein", "relativistic")
# The verdict of an undecided critic, for losses in which a single verdict has a meaning.
UNDECIDED = {"non_saturating": 0.0, "hinge": 0.0, "least_squares": 0.5}


def critic_loss(kind: str, real: jax.Array, fake: jax.Array) -> jax.Array:
    """The loss of the critic, a scalar.

    Args:
      kind: one of LOSSES: Goodfellow et al. 2014; Lim and Ye 2017; Mao et al. 2017 with targets 0
        and 1; Arjovsky et al. 2017; Jolicoeur-Martineau 2019 with paired real and fake verdicts.
      real: verdicts on data, of any shape.
      fake: verdicts on generated examples; for "relativistic", in the shape of `real`.
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
    """The loss of the generator, a scalar; only "relativistic" uses the verdicts on data."""
    if kind == "non_saturating":
        return jnp.mean(jax.nn.softplus(-fake))
    if kind == "least_squares":
        return jnp.mean(jnp.square(fake - 1)) / 2
    if kind == "relativistic":
        return jnp.mean(jax.nn.softplus(real - fake))
    return -jnp.mean(fake)


def adaptive_weight(reconstruction_gradient, adversarial_gradient) -> jax.Array:
    """Weight of the adversarial loss: the ratio of gradient norms, at most 10,000.

    Esser et al. 2021, equation 7. Both gradients are with respect to the decoder's last layer; with
    this weight, both losses pull on it equally hard.
    """
    norms = map(optax.tree.norm, (reconstruction_gradient, adversarial_gradient))
    reconstruction, adversarial = norms
    return jax.lax.stop_gradient(jnp.clip(reconstruction / (adversarial + 1e-4), 0, 1e4))
