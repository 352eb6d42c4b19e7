"""The 8x8 handwritten digits bundled with scikit-learn: real data without a download.

1,797 images with 17 gray levels: the test set of "Optical Recognition of Handwritten Digits"
(Alpaydin and Kaynak 1998).
"""

import functools
import hashlib

import numpy as np

from genai_jax.config import ConfigError
from genai_jax.data.images.in_memory import MemoryImages

SIZE, LEVELS = 8, 17
NAMES = tuple("0123456789")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def open_digits(config, split: str) -> MemoryImages:
    if config.image_size not in (None, SIZE):
        raise ConfigError(f"--data.image_size={config.image_size}: digits are {SIZE}x{SIZE}")
    images, labels = _load()
    held_out = _held_out(config.validation_percent)
    chosen = held_out if split == "validation" else ~held_out
    captions = [f"a handwritten {WORDS[label]}" for label in labels[chosen, 0]]
    return MemoryImages(
        f"digits[{split}]", images[chosen], labels[chosen], classes=NAMES, captions=captions,
        levels=LEVELS,
    )  # fmt: skip


def pixel_documents(validation_percent: int, split: str) -> list[str]:
    """The images of a split as texts "= p0 p1 ...", gray levels in raster order.

    The splits are those of `open_digits`. With ``--data.answer_after==``, the pixels and nothing
    else are targets.
    """
    images, _ = _load()
    held_out = _held_out(validation_percent)
    images = images[held_out if split == "validation" else ~held_out]
    return ["= " + " ".join(map(str, image.ravel().tolist())) for image in images]


@functools.cache
def _load() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = data.images.astype(np.uint8)[..., None]
    return images, data.target.astype(np.int32)[:, None]


@functools.cache
def _held_out(percent: int) -> np.ndarray:
    """Which images are held out, [images] bool: the smallest content hashes of each digit."""
    images, labels = _load()
    hashes = np.array([hashlib.sha256(x.tobytes()).hexdigest() for x in images])
    held_out = np.zeros(len(images), bool)
    for digit in range(len(NAMES)):
        (indices,) = np.nonzero(labels[:, 0] == digit)
        order = indices[np.argsort(hashes[indices])]
        held_out[order[: max(1, len(indices) * percent // 100)]] = True
    return held_out
