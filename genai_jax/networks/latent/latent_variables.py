"""What an encoder and a prior say of latent variables, and a draw of them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Latents(NamedTuple):
    """Normal latents of one stage, each array [batch, groups, ...]."""

    z: jax.Array  # drawn, or as given
    mean: jax.Array  # of the posterior; the prior's where there is no image
    log_scale: jax.Array
    prior_mean: jax.Array
    prior_log_scale: jax.Array


def draw_latents(
    posterior: tuple | None,
    prior: tuple[jax.Array, jax.Array],
    given: jax.Array | None,
    rng: jax.Array | None,
    temperature: float = 1.0,
) -> Latents:
    """Draws from the posterior (mean, log-scale) if there is one, else from the prior.

    Args:
      posterior, prior: means and logarithms of standard deviations.
      given: latents to take in the place of a draw.
      rng: key; None takes the mean.
      temperature: of the standard deviations.
    """
    mean, log_scale = prior if posterior is None else posterior
    z = mean if given is None else given
    if given is None and rng is not None:
        z = mean + temperature * jnp.exp(log_scale) * jax.random.normal(rng, mean.shape)
    return Latents(z, mean, log_scale, *prior)
