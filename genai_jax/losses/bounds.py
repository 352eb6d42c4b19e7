"""Lower bounds on the log-likelihood of latent-variable models."""

import jax
import jax.numpy as jnp


def importance_weighted(log_weights: jax.Array) -> jax.Array:
    """log mean exp over the samples: [samples, batch] -> [batch] (Burda et al. 2016, equation 8).

    With one sample, it estimates the evidence lower bound; more samples never lower its mean.
    """
    return jax.nn.logsumexp(log_weights, 0) - jnp.log(log_weights.shape[0])


def kl_with_free_bits(kl: jax.Array, free: float) -> jax.Array:
    """The KL divergence with free bits: [batch, groups] -> scalar, nats.

    Each group contributes its mean over the batch, but at least `free` nats, so that using up to
    that many costs nothing extra (Kingma et al. 2016, equation 15).
    """
    return jnp.sum(jnp.maximum(jnp.mean(kl, 0), free))


def normal_kl(mean, log_scale, prior_mean=0.0, prior_log_scale=0.0) -> jax.Array:
    """KL(N(mean, scale^2) || N(prior_mean, prior_scale^2)), elementwise, nats."""
    ratio = jnp.exp(2 * (log_scale - prior_log_scale))
    shift = jnp.square((mean - prior_mean) * jnp.exp(-prior_log_scale))
    return (ratio + shift - 1) / 2 - (log_scale - prior_log_scale)
