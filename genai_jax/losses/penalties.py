"""Gradient penalties of adversarial training. Weights are applied elsewhere."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Judge = Callable[[jax.Array], jax.Array]  # [batch, ...] -> verdicts [batch]


def zero_centered(judge: Judge, x: jax.Array) -> jax.Array:
    """Half the mean squared norm of the critic's gradient at `x` (Mescheder et al. 2018, eq. 9).

    R1 at data, R2 at what the generator made.
    """
    return jnp.mean(squared_norms(_gradients(judge, x))) / 2


def one_centered(judge: Judge, real: jax.Array, fake: jax.Array, rng: jax.Array) -> jax.Array:
    """Mean of (norm of the gradient - 1)^2 between data and fakes (Gulrajani et al. 2017)."""
    where = jax.random.uniform(rng, (real.shape[0], *(1,) * (real.ndim - 1)))
    norms = safe_sqrt(squared_norms(_gradients(judge, where * real + (1 - where) * fake)))
    return jnp.mean(jnp.square(norms - 1))


def path_lengths(
    synthesize: Callable[[jax.Array], jax.Array], styles: jax.Array, rng: jax.Array
) -> jax.Array:
    """How far images move with their styles: |J^T y| of each, [batch].

    y is noise of the images' shape divided by the root of their number of pixels (Karras et al.
    2020, "Analyzing and improving the image quality of StyleGAN", equation 4).
    """
    images, pull = jax.vjp(synthesize, styles)
    pixels = images[0].size // images.shape[-1]
    (moved,) = pull(jax.random.normal(rng, images.shape) * pixels**-0.5)
    return safe_sqrt(squared_norms(moved))


def squared_norms(x: jax.Array) -> jax.Array:
    """[batch, ...] -> [batch]."""
    return jnp.sum(jnp.square(x), range(1, x.ndim))


def safe_sqrt(x: jax.Array) -> jax.Array:
    """The root, whose gradient at 0 is 0."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)


def _gradients(judge: Judge, x: jax.Array) -> jax.Array:
    return jax.grad(lambda x: jnp.sum(judge(x)))(x)
