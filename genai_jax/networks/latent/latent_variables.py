"""Gaussian latent variables: samples of them, their posterior and their prior."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Latents(NamedTuple):
    """Gaussian latents of one stage, each array [batch, groups, ...]."""

    z: jax.Array  # sampled, or as given
    mean: jax.Array  # of the posterior; the prior's if there is no image
    log_scale: jax.Array  # likewise
    prior_mean: jax.Array
    prior_log_scale: jax.Array


def sample_latents(
    posterior: tuple | None,
    prior: tuple[jax.Array, jax.Array],
    given: jax.Array | None,
    rng: jax.Array | None,
    temperature: float = 1.0,
) -> Latents:
    """Samples from the posterior if there is one, otherwise from the prior.

    Args:
      posterior: (mean, log standard deviation), or None.
      prior: (mean, log standard deviation).
      given: latents to use instead of sampling.
      rng: key; None to take the mean.
      temperature: factor of the standard deviations.
    """
    mean, log_scale = prior if posterior is None else posterior
    z = mean if given is None else given
    if given is None and rng is not None:
        z = mean + temperature * jnp.exp(log_scale) * jax.random.normal(rng, mean.shape)
    return Latents(z, mean, log_scale, *prior)
