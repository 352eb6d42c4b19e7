"""Samples of sound as 256 levels that are denser where the sound is soft."""

import numpy as np

LEVELS = 256
_MU = LEVELS - 1


def encode(samples: np.ndarray) -> np.ndarray:
    """Levels of samples, uint8 of the same shape.

    The continuous mu-law (van den Oord et al. 2016, "WaveNet", section 2.2), rounded.

    Args:
      samples: between -1 and 1; louder ones are clipped.
    """
    x = np.clip(np.asarray(samples, np.float64), -1, 1)
    compressed = np.sign(x) * np.log1p(_MU * np.abs(x)) / np.log1p(_MU)
    return np.rint((compressed + 1) / 2 * _MU).astype(np.uint8)


def decode(levels: np.ndarray) -> np.ndarray:
    """The samples that levels stand for, float64 between -1 and 1: the inverse of `encode`."""
    compressed = 2 * np.asarray(levels, np.float64) / _MU - 1
    return np.sign(compressed) * np.expm1(np.abs(compressed) * np.log1p(_MU)) / _MU
