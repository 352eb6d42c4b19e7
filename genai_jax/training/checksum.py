"""Checksums of a train state, computed on its devices, to verify that a checkpoint is intact.

Neither orbax nor its storage detects a changed byte inside an array. Sums of integers modulo 2**32
do not depend on their order, so a checksum is the same on every mesh.
"""

import json
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from genai_jax.training.trees import path_name


def checksums(state: Any, **records: Any) -> dict[str, int]:
    """Path -> checksum of each array of `state`, and name -> checksum of each JSON record."""
    paths = [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
    sums = jax.device_get(_checksums(jax.tree.leaves(state)))
    array_sums = {path: int(value) for path, value in zip(paths, sums, strict=True)}
    texts = {name: json.dumps(record, sort_keys=True) for name, record in records.items()}
    return array_sums | {name: zlib.crc32(text.encode()) for name, text in texts.items()}


@jax.jit
def _checksums(arrays: list[jax.Array]) -> list[jax.Array]:
    return [_checksum(array) for array in arrays]


def _checksum(x: jax.Array) -> jax.Array:
    """Sum of hashes of every element and its index: a change of any one element changes it."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    width = min(x.dtype.itemsize, 4)  # eight bytes become a last dimension of two
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * width}").astype(jnp.uint32)
    index = jnp.uint32(0)
    for axis, size in enumerate(bits.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    bits = bits ^ (index * jnp.uint32(0x9E3779B1))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # the finalizer of MurmurHash3
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return jnp.sum(bits ^ (bits >> 16), dtype=jnp.uint32)
