"""Spectral normalization (Miyato et al. 2018): kernels divided by their largest singular value."""

import flax.linen as nn
import jax
import jax.numpy as jnp


def spectral_normalized(module: nn.Module, kernel: jax.Array) -> jax.Array:
    """Divides a kernel [..., features] by its norm as a matrix with `features` columns, float32.

    The norm is estimated by power iteration on a vector in the variable collection "spectral", with
    one iteration per call in which that collection is mutable. Call it once, in a compact method of
    `module`.
    """
    matrix = kernel.reshape(-1, kernel.shape[-1])
    start = lambda: _unit(jax.random.normal(module.make_rng("params"), matrix.shape[-1:]))
    vector = module.variable("spectral", "vector", start)
    left, right = _iterate(jax.lax.stop_gradient(matrix), vector.value)
    if module.is_mutable_collection("spectral") and not module.is_initializing():
        vector.value = right
    return kernel / (left @ matrix @ right)


def _iterate(matrix: jax.Array, right: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One power iteration; returns unit vectors [rows] and [columns]."""
    left = _unit(matrix @ right)
    return left, _unit(left @ matrix)


def _unit(x: jax.Array) -> jax.Array:
    return x / (jnp.linalg.norm(x) + 1e-12)
