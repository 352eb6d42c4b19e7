"""Starting from an image, keeping a part of it, and going from one to another."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from genai_jax.diffusion.schedule import Schedule

Denoise = Callable[[jax.Array, jax.Array], jax.Array]


def noised_start(schedule: Schedule, image: jax.Array, t: float, key: jax.Array) -> jax.Array:
    """The image with the noise of time t: where SDEdit starts (Meng et al. 2022, algorithm 1)."""
    t = jnp.asarray(t, image.dtype)
    noise = jax.random.normal(key, image.shape, image.dtype)
    return schedule.alpha(t) * image + schedule.sigma(t) * noise


def inpaint(denoise: Denoise, known: jax.Array, mask: jax.Array) -> Denoise:
    """A denoiser that is sure of the data where mask is 1 and asks `denoise` elsewhere.

    With it, a solver arrives at `known` there exactly, and on the way has it with the noise of the
    time. A mask of the border outpaints.

    Args:
      denoise: the model.
      known: data, broadcastable to [batch, *space, channels].
      mask: 1 where `known` holds, broadcastable likewise.
    """

    def sure(x, t):
        return mask * known + (1 - mask) * denoise(x, t)

    return sure


def slerp(first: jax.Array, second: jax.Array, weight: jax.Array) -> jax.Array:
    """From `first` (weight 0) to `second` (1) along a great circle, each example [batch, ...].

    Shoemake 1985. Noise stays noise on the way: its norm hardly changes.
    """
    axes = tuple(range(1, first.ndim))
    dot = lambda a, b: jnp.sum(a * b, axes, keepdims=True)
    cosine = dot(first, second) / jnp.sqrt(dot(first, first) * dot(second, second))
    angle = jnp.arccos(jnp.clip(cosine, -1, 1))
    sine = jnp.sin(angle)
    near = sine < 1e-6
    safe = jnp.where(near, 1.0, sine)
    a = jnp.where(near, 1 - weight, jnp.sin((1 - weight) * angle) / safe)
    b = jnp.where(near, weight, jnp.sin(weight * angle) / safe)
    return a * first + b * second
