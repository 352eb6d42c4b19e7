"""Position encodings."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from genai_jax.networks.layers.rope_scaling import RopeScaling


class Rotation(NamedTuple):
    """Cosines and signed sines, each [batch, length, 1, 2, head_dim / 2], float32."""

    cos: jax.Array
    sin: jax.Array


def rotation(
    positions: jax.Array,
    head_dim: int,
    *,
    theta: float = 10_000.0,
    scaling: RopeScaling = RopeScaling(),  # noqa: B008 (immutable)
) -> Rotation:
    """The rotary angles of positions [batch, length]; compute them once for all layers.

    Su et al. 2021, "RoFormer", equation 34, with channel i paired with channel i + head_dim / 2.

    Args:
      positions: [batch, length] integers.
      head_dim: width of a head, even.
      theta: base of the geometric sequence of wavelengths.
      scaling: how frequencies differ from that sequence.
    """
    frequencies = scaling.frequencies(head_dim // 2, theta)
    angles = positions[..., None, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return Rotation(jnp.concatenate([cos, cos], -2), jnp.concatenate([-sin, sin], -2))


def axial_rotation(shape: tuple[int, ...], head_dim: int, *, theta: float = 100.0) -> Rotation:
    """The rotary angles of the points of a grid, [1, points, 1, 2, head_dim / 2].

    Each axis of the grid rotates an equal share of the channel pairs; leftover pairs are not
    rotated.
    """
    half = head_dim // 2
    share = half // len(shape)
    frequencies = theta ** (-np.arange(share, dtype=np.float32) / max(share, 1))
    grid = np.stack([x.ravel() for x in np.indices(shape)], 1).astype(np.float32)
    angles = (grid[:, :, None] * frequencies).reshape(len(grid), -1)
    angles = np.pad(angles, ((0, 0), (0, half - angles.shape[1])))[None, :, None, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return Rotation(jnp.concatenate([cos, cos], -2), jnp.concatenate([-sin, sin], -2))


def axial_sinusoidal(shape: tuple[int, ...], dim: int) -> np.ndarray:
    """Sines and cosines of the coordinates of a grid, [points, dim]: an equal share for each axis.

    The two-dimensional case is the position embedding of Dosovitskiy et al. 2021 in the fixed form
    of Peebles and Xie 2023.
    """
    share = dim // len(shape) // 2
    frequencies = 10_000.0 ** (-np.arange(share, dtype=np.float32) / max(share, 1))
    grid = np.stack([x.ravel() for x in np.indices(shape)], 1).astype(np.float32)
    angles = grid[:, :, None] * frequencies
    encoding = np.concatenate([np.sin(angles), np.cos(angles)], -1).reshape(len(grid), -1)
    return np.pad(encoding, ((0, 0), (0, dim - encoding.shape[1])))


def rotary(x: jax.Array, by: Rotation) -> jax.Array:
    """Rotates pairs of channels of queries or keys, [batch, length, heads, head_dim], in float32.

    Reversing an axis of size 2 swaps the two channels of a pair, which XLA fuses; concatenating two
    rotated halves would write them twice.
    """
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
    rotated = pairs * by.cos + jnp.flip(pairs, -2) * by.sin
    return rotated.reshape(x.shape).astype(x.dtype)


def sinusoidal(positions: jax.Array, dim: int) -> jax.Array:
    """Sines and cosines of the position at geometric wavelengths, [batch, length, dim], float32.

    Vaswani et al. 2017, section 3.5: sines fill the first half of the channels, cosines the second.
    """
    half = dim // 2
    frequencies = 10_000.0 ** (-np.arange(half, dtype=np.float32) / max(half - 1, 1))
    angles = positions[..., None].astype(jnp.float32) * frequencies
    encoding = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
    return jnp.pad(encoding, ((0, 0), (0, 0), (0, dim % 2)))


def alibi_slopes(num_heads: int) -> np.ndarray:
    """One slope per head, [heads], float32: the geometric sequence of Press et al. 2022, section 3.

    If the number of heads is not a power of two, the sequence for the next smaller power is
    completed with every second slope of the next larger one, as in the authors' code.
    """

    def powers(count: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / count) for i in range(count)]

    power = 2 ** math.floor(math.log2(num_heads))
    extra = powers(2 * power)[::2][: num_heads - power]
    return np.array(powers(power) + extra, np.float32)
