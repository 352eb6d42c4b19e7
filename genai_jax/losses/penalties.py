"""Gradient penalties for adversarial training, unweighted."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Judge = Callable[[jax.Array], jax.Array]  # [batch, ...] -> verdicts [batch]


def zero_centered(judge: Judge, x: jax.Array) -> jax.Array:
    """Half the mean squared norm of the critic's gradient at `x` (Mescheder et al. 2018, eq. 9).

    R1 if `x` is data, R2 if it is generated.
    """
    return jnp.mean(squared_norms(_gradients(judge, x))) / 2


def one_centered(judge: Judge, real: jax.Array, fake: jax.Array, rng: jax.Array) -> jax.Array:
    """Mean of (gradient norm - 1)^2 at random points between data and fakes.

    WGAN-GP: Gulrajani et al. 2017, equation 3.
    """
    weight = jax.random.uniform(rng, (real.shape[0], *(1,) * (real.ndim - 1)))
    norms = safe_sqrt(squared_norms(_gradients(judge, weight * real + (1 - weight) * fake)))
    return jnp.mean(jnp.square(norms - 1))


def path_lengths(
    synthesize: Callable[[jax.Array], jax.Array], styles: jax.Array, rng: jax.Array
) -> jax.Array:
    """How strongly each image depends on its style: |J^T y|, [batch].

    y is noise in the images' shape, divided by the square root of their number of pixels (Karras et
    al. 2020, "Analyzing and improving the image quality of StyleGAN", equation 4).
    """
    images, vjp = jax.vjp(synthesize, styles)
    pixels = images[0].size // images.shape[-1]
    (products,) = vjp(jax.random.normal(rng, images.shape) * pixels**-0.5)
    return safe_sqrt(squared_norms(products))


def squared_norms(x: jax.Array) -> jax.Array:
    """Squared norm of each example: [batch, ...] -> [batch]."""
    return jnp.sum(jnp.square(x), range(1, x.ndim))


def safe_sqrt(x: jax.Array) -> jax.Array:
    """The square root, with gradient 0 at 0."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)


def _gradients(judge: Judge, x: jax.Array) -> jax.Array:
    return jax.grad(lambda x: jnp.sum(judge(x)))(x)
