"""Absorbing-state diffusion of discrete data: tokens turn into masks (Austin et al. 2021).

At time t, each token is a mask with probability t. The continuous-time bound on -log p(x) is

    integral over t in (0, 1) of E[sum over masks of -log p(x_i | x_t)] / t

for every schedule (Sahoo et al. 2024, MDLM, equations 10 and 11; Shi et al. 2024, equation 5).
Given that m of n tokens are masks, every set of m is equally likely, and the integral over t of
t^(m-1) (1-t)^(n-m) is 1 / (m C(n, m)): the bound equals the mean, over m uniform on 1 .. n and
over sets of m tokens, of n / m times the same sum (Hoogeboom et al. 2022, equation 7). That is
what is estimated here: the number of masks follows from the time, so that it adds no variance, and
no weight is infinite. With one token it is exact.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from genai_jax.diffusion.times import quantiles


class Masks(NamedTuple):
    """Random masks of tokens, [batch, length]."""

    masked: jax.Array  # bool
    weight: jax.Array  # float32: tokens of the block / masks of the block, 0 where there is none


def random_masks(key: jax.Array, counts: jax.Array, block: int) -> Masks:
    """Masks at a random time for every block of a row.

    The sum of weight x -log p(x_i | x_t) over the masks is an unbiased estimate of the bound; for
    blocks, of the sum of their bounds, each given what comes before it.

    Args:
      key: random key.
      counts: [batch, length] bool, the tokens that may be masked. Those that may not are given.
      block: tokens of a block, which divides the length; the times of all blocks together have low
        discrepancy (Kingma et al. 2021, appendix I.1).
    """
    time_key, order_key = jax.random.split(key)
    blocks = counts.reshape(counts.shape[0], -1, block)
    n = jnp.sum(blocks, -1, keepdims=True)
    t = quantiles(time_key, n.size, True)
    if blocks.shape[1] > 1:  # they are in order: neighbors would have the same time
        t = jax.random.permutation(jax.random.fold_in(time_key, 1), t)
    t = t.reshape(n.shape)
    m = jnp.clip(jnp.ceil(t * n), 1, n)  # uniform on 1 .. n, and 0 where n is
    order = jnp.where(blocks, jax.random.uniform(order_key, blocks.shape), jnp.inf)
    masked = (_ranks(order) < m) & blocks
    weight = masked * (n / jnp.maximum(m, 1))
    return Masks(masked.reshape(counts.shape), weight.reshape(counts.shape))


def _ranks(x: jax.Array) -> jax.Array:
    """The rank of each number along the last axis, 0 for the lowest."""
    return jnp.argsort(jnp.argsort(x, -1), -1)
