"""What word vectors minimize: negative sampling, and least squares of log co-occurrences."""

import jax
import jax.numpy as jnp


def negative_sampling(vectors: jax.Array, targets: jax.Array, negatives: jax.Array) -> jax.Array:
    """-log sigma(u . v) - sum over negatives of log sigma(-u' . v), nats.

    Mikolov et al. 2013, "Distributed representations of words and phrases and their
    compositionality", eq. 4, with the expectation replaced by samples.

    Args:
      vectors: v, of what predicts, [..., dim].
      targets: u, of what is predicted, [..., dim].
      negatives: u', of words sampled from the noise distribution, [..., k, dim].

    Returns:
      [...], float32.
    """
    positive = jnp.sum(vectors * targets, -1)
    noise = jnp.einsum("...d,...kd->...k", vectors, negatives)
    return jax.nn.softplus(-positive) + jnp.sum(jax.nn.softplus(noise), -1)


def expected_noise(vectors: jax.Array, contexts: jax.Array, noise: jax.Array) -> jax.Array:
    """The expectation over the noise distribution of what one negative adds to the loss above.

    Args:
      vectors: v, [n, dim].
      contexts: u' of all words, [words, dim].
      noise: the probability of each, [words].

    Returns:
      [n], float32.
    """
    return jax.nn.softplus(vectors @ contexts.T) @ noise


def cooccurrence_weight(count: jax.Array, x_max: float, alpha: float) -> jax.Array:
    """(x / x_max)^alpha below x_max, 1 from there on.

    Pennington et al. 2014, "GloVe: Global vectors for word representation", eq. 9.
    """
    return jnp.minimum(1.0, (count / x_max) ** alpha)


def log_count_residual(
    words: jax.Array, contexts: jax.Array, biases: jax.Array, counts: jax.Array
) -> jax.Array:
    """w . w' + b + b' - log x, whose weighted square GloVe minimizes (same paper, eq. 8).

    Args:
      words, contexts: [n, dim].
      biases: b + b', [n].
      counts: x, [n], positive.
    """
    return jnp.sum(words * contexts, -1) + biases - jnp.log(counts)
