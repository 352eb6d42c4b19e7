"""Image editing: starting from an image, inpainting, and interpolating between noises."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from genai_jax.diffusion.schedule import Schedule

Denoise = Callable[[jax.Array, jax.Array], jax.Array]


def noised_start(schedule: Schedule, image: jax.Array, t: float, key: jax.Array) -> jax.Array:
    """The image noised to time t: where SDEdit starts (Meng et al. 2022, algorithm 1)."""
    t = jnp.asarray(t, image.dtype)
    noise = jax.random.normal(key, image.shape, image.dtype)
    return schedule.alpha(t) * image + schedule.sigma(t) * noise


def inpaint(denoise: Denoise, known: jax.Array, mask: jax.Array) -> Denoise:
    """A denoiser that returns the known data where the mask is 1 and calls `denoise` elsewhere.

    With it, a solver ends exactly at `known` inside the mask, and before that passes through
    `known` at each time's noise level. With a mask that covers all but the border, it outpaints.

    Args:
      denoise: the model.
      known: data, broadcastable to [batch, *space, channels].
      mask: 1 where `known` applies, broadcastable to the same shape.
    """

    def denoise_unknown(x, t):
        return mask * known + (1 - mask) * denoise(x, t)

    return denoise_unknown


def slerp(first: jax.Array, second: jax.Array, weight: jax.Array) -> jax.Array:
    """Interpolates along a great circle from `first` (weight 0) to `second` (1), [batch, ...].

    Shoemake 1985. Points between two Gaussian noises look like noise too: their norm hardly
    changes.
    """
    axes = tuple(range(1, first.ndim))
    dot = lambda a, b: jnp.sum(a * b, axes, keepdims=True)
    cosine = dot(first, second) / jnp.sqrt(dot(first, first) * dot(second, second))
    angle = jnp.arccos(jnp.clip(cosine, -1, 1))
    sine = jnp.sin(angle)
    parallel = sine < 1e-6
    divisor = jnp.where(parallel, 1.0, sine)
    a = jnp.where(parallel, 1 - weight, jnp.sin((1 - weight) * angle) / divisor)
    b = jnp.where(parallel, weight, jnp.sin(weight * angle) / divisor)
    return a * first + b * second
