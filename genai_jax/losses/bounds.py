"""Lower bounds of the log-likelihood of a latent-variable model."""

import jax
import jax.numpy as jnp


def importance_weighted(log_weights: jax.Array) -> jax.Array:
    """log mean exp over the samples: [samples, batch] -> [batch] (Burda et al. 2016, equation 8).

    With one sample it is an estimate of the evidence lower bound; its mean does not fall with more.
    """
    return jax.nn.logsumexp(log_weights, 0) - jnp.log(log_weights.shape[0])


def with_free_bits(kl: jax.Array, free: float) -> jax.Array:
    """The KL divergence that is paid for: [batch, groups] -> scalar, nats.

    The first `free` nats of each group, averaged over the batch, cost the same whether they are
    used or not (Kingma et al. 2016, equation 15).
    """
    return jnp.sum(jnp.maximum(jnp.mean(kl, 0), free))


def normal_kl(mean, log_scale, prior_mean=0.0, prior_log_scale=0.0) -> jax.Array:
    """KL divergence of one normal distribution to another, elementwise, nats."""
    ratio = jnp.exp(2 * (log_scale - prior_log_scale))
    shift = jnp.square((mean - prior_mean) * jnp.exp(-prior_log_scale))
    return (ratio + shift - 1) / 2 - (log_scale - prior_log_scale)
