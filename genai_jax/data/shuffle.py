"""A random permutation that takes no memory and is the same on every machine."""

import functools
import hashlib

import numpy as np

# Grain permutes at least 65,536 numbers and skips those out of range, which is slow for a small
# data set.
_SMALL = 4096


def permuted(index: int, size: int, seed: tuple[int, ...]) -> int:
    """The image of `index` under a permutation of ``range(size)`` that `seed` determines."""
    if size <= _SMALL:
        return _small_permutation(size, seed)[index]
    import grain

    (state,) = np.random.SeedSequence(seed).generate_state(1)
    return grain.experimental.index_shuffle(index, size - 1, int(state), 4)


@functools.lru_cache(maxsize=8)
def _small_permutation(size: int, seed: tuple[int, ...]) -> list[int]:
    return sorted(range(size), key=lambda i: hashlib.sha256(f"{seed} {i}".encode()).digest())
