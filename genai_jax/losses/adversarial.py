"""Adversarial losses of critic and generator, and their weight relative to another loss.

`real` are verdicts on data, of any shape, and `fake` those on generated examples; higher means more
real. Losses are scalars.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from genai_jax.config import ConfigError
from genai_jax.outside import load_outside


class AdversarialLoss(NamedTuple):
    """What both players of an adversarial game minimize.

    Attributes:
      critic: (real, fake) -> the loss of the critic.
      generator: (real, fake) -> the loss of the generator; real is None unless `paired`.
      undecided: the verdict of an undecided critic; None if a single verdict has no meaning.
      paired: whether the generator's loss uses the verdicts on data.
    """

    critic: Callable[[jax.Array, jax.Array], jax.Array]
    generator: Callable[[jax.Array, jax.Array], jax.Array]
    undecided: float | None = None
    paired: bool = False


LOSSES = {
    # Goodfellow et al. 2014
    "non_saturating": AdversarialLoss(
        lambda real, fake: jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake)),
        lambda real, fake: jnp.mean(jax.nn.softplus(-fake)),
        undecided=0.0,
    ),
    # Lim and Ye 2017
    "hinge": AdversarialLoss(
        lambda real, fake: jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake)),
        lambda real, fake: -jnp.mean(fake),
        undecided=0.0,
    ),
    # Mao et al. 2017, with targets 0 and 1
    "least_squares": AdversarialLoss(
        lambda real, fake: (jnp.mean(jnp.square(real - 1)) + jnp.mean(jnp.square(fake))) / 2,
        lambda real, fake: jnp.mean(jnp.square(fake - 1)) / 2,
        undecided=0.5,
    ),
    # Arjovsky et al. 2017
    "wasserstein": AdversarialLoss(
        lambda real, fake: jnp.mean(fake) - jnp.mean(real),
        lambda real, fake: -jnp.mean(fake),
    ),
    # Jolicoeur-Martineau 2019, with paired verdicts on data and on generated examples
    "relativistic": AdversarialLoss(
        lambda real, fake: jnp.mean(jax.nn.softplus(fake - real)),
        lambda real, fake: jnp.mean(jax.nn.softplus(real - fake)),
        paired=True,
    ),
}


def adversarial_loss(name: str) -> AdversarialLoss:
    """The loss of this name: one of LOSSES, or "my_package.my_module:MY_LOSS".

    Raises:
      ConfigError: what is named is not an `AdversarialLoss`.
    """
    if name in LOSSES:
        return LOSSES[name]
    loss = load_outside("--gan.loss", name)
    if not isinstance(loss, AdversarialLoss):
        raise ConfigError(
            f"--gan.loss={name} is not a genai_jax.losses.adversarial.AdversarialLoss"
        )
    return loss


def adaptive_weight(reconstruction_gradient, adversarial_gradient) -> jax.Array:
    """Weight of the adversarial loss: the ratio of gradient norms, at most 10,000.

    Esser et al. 2021, equation 7. Both gradients are with respect to the decoder's last layer; with
    this weight, both losses pull on it equally hard.
    """
    norms = map(optax.tree.norm, (reconstruction_gradient, adversarial_gradient))
    reconstruction, adversarial = norms
    return jax.lax.stop_gradient(jnp.clip(reconstruction / (adversarial + 1e-4), 0, 1e4))
