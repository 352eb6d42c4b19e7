"""Paths through a latent space, for visualization."""

import io

import jax
import jax.numpy as jnp
import numpy as np

from genai_jax.config import ConfigError
from genai_jax.diffusion.editing import slerp
from genai_jax.files import MIB, read_bytes, unreadable
from genai_jax.grids import Labels, scale
from genai_jax.tasks.arrays.data import ArrayData

PATHS = ("linear", "spherical")
PAIRS = Labels("left: held-out image, right: reconstruction")


def path(first: jax.Array, second: jax.Array, steps: int, kind: str) -> jax.Array:
    """Points on a path from `first` to `second`, both included: [steps, batch, ...].

    Args:
      first, second: [batch, ...].
      steps: number of points, at least 2.
      kind: "linear", or "spherical" for a path along a great circle.
    """
    weights = jnp.linspace(0.0, 1.0, steps)
    if kind == "linear":
        return jax.vmap(lambda w: (1 - w) * first + w * second)(weights)
    return jax.vmap(lambda w: slerp(first, second, w))(weights)


def walk_labels(
    data: ArrayData, labels: np.ndarray | None, columns: int, title: str = ""
) -> Labels:
    """What is written around walks from 0 to 1, one per row.

    Args:
      data: with the names of the classes.
      labels: of all images, [rows * columns, attributes]; None without classes.
      columns: images per walk.
      title: of the whole.
    """
    rows = None if labels is None else labels[::columns]
    return Labels(title, scale(0, 1, columns), data.label_texts(rows))


def traversal(center: np.ndarray, dimensions: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Copies of one point, each with one dimension set to one value.

    Args:
      center: the point, [size].
      dimensions: dimension to change in each row, [rows].
      values: its values, [rows, columns].

    Returns:
      [rows * columns, size].
    """
    points = np.tile(center, (*values.shape, 1))
    points[np.arange(len(dimensions)), :, dimensions] = values
    return points.reshape(-1, len(center))


def most_active(means: np.ndarray, count: int) -> np.ndarray:
    """The `count` dimensions whose posterior means [images, size] vary most over the images.

    The means of dimensions that the model does not use stay at the prior's (Burda et al. 2016,
    section 5).
    """
    return np.argsort(-np.var(means, 0), kind="stable")[:count]


def read_latents(path: str, latent_dim: int) -> np.ndarray:
    """Latents [n, latent_dim], float32, from an .npy file.

    Raises:
      ConfigError: the file cannot be read, or its latents have another size.
    """
    label = f"--latents={path}"
    content = io.BytesIO(read_bytes(path, label, limit=256 * MIB))
    try:
        z = np.lib.format.read_array(content, allow_pickle=False)
    except Exception:  # a damaged header raises many types
        raise unreadable(path, "it is not an .npy array", label) from None
    if z.ndim != 2 or z.shape[1] != latent_dim or z.dtype.kind not in "fiu" or not len(z):
        raise ConfigError(
            f"--latents={path} holds {z.dtype} {list(z.shape)}; this model takes numbers of shape "
            f"[n, {latent_dim}]"
        )
    return z.astype(np.float32)
