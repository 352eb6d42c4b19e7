"""Ways through a space of latents, to be looked at."""

import jax
import jax.numpy as jnp
import numpy as np

from genai_jax.config import ConfigError
from genai_jax.diffusion.editing import slerp

PATHS = ("linear", "spherical")


def path(first: jax.Array, second: jax.Array, steps: int, kind: str) -> jax.Array:
    """From `first` to `second` in `steps` points, both ends among them: [steps, batch, ...].

    Args:
      first, second: [batch, ...].
      steps: at least 2.
      kind: "linear", or "spherical", along a great circle.
    """
    weights = jnp.linspace(0.0, 1.0, steps)
    if kind == "linear":
        return jax.vmap(lambda w: (1 - w) * first + w * second)(weights)
    return jax.vmap(lambda w: slerp(first, second, w))(weights)


def traversal(center: np.ndarray, dimensions: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Copies of one point, each with one dimension set to one value.

    Args:
      center: [size].
      dimensions: [rows].
      values: of each of them, [rows, columns].

    Returns:
      [rows * columns, size].
    """
    points = np.tile(center, (*values.shape, 1))
    points[np.arange(len(dimensions)), :, dimensions] = values
    return points.reshape(-1, len(center))


def most_active(means: np.ndarray, count: int) -> np.ndarray:
    """The dimensions whose posterior mean varies most over images [images, size], at most `count`.

    What the model uses varies, the rest stays at the prior's mean (Burda et al. 2016, section 5).
    """
    return np.argsort(-np.var(means, 0), kind="stable")[:count]


def read_latents(path: str, latent_dim: int) -> np.ndarray:
    """Latents [n, latent_dim], float32, from an .npy file.

    Raises:
      ConfigError: no such file, or latents of another size.
    """
    try:
        z = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no .npy array"
        raise ConfigError(f"cannot read --latents={path}: {reason}") from None
    if z.ndim != 2 or z.shape[1] != latent_dim or z.dtype.kind not in "fiu" or not len(z):
        raise ConfigError(
            f"--latents={path} holds {z.dtype} {list(z.shape)}; this model takes "
            f"[n, {latent_dim}] numbers"
        )
    return z.astype(np.float32)
