"""The 8x8 handwritten digits bundled with scikit-learn: real data without a download.

1,797 images with 17 gray levels: the test set of "Optical Recognition of Handwritten Digits"
(Alpaydin and Kaynak 1998).
"""

import functools
import hashlib

import numpy as np

from genai_jax.config import ConfigError

SIZE, LEVELS = 8, 17
NAMES = tuple("0123456789")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Digits:
    """One split, held in memory."""

    shape = (SIZE, SIZE, 1)
    levels = LEVELS
    label_names = (NAMES,)
    has_captions = True
    can_flip = False

    def __init__(self, split: str, images: np.ndarray, labels: np.ndarray):
        self.name = f"digits[{split}]"
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        labels = self.labels[index]
        caption = f"a handwritten {WORDS[labels[0]]}"
        return {"image": self.images[index], "labels": labels, "caption": caption}

    def fingerprint(self) -> str:
        return hashlib.sha256(self.images.tobytes() + self.labels.tobytes()).hexdigest()


def open_digits(config, split: str) -> Digits:
    if config.image_size not in (None, SIZE):
        raise ConfigError(f"--data.image_size={config.image_size}: digits are {SIZE}x{SIZE}")
    images, labels = _load()
    held_out = _held_out(config.validation_percent)
    in_split = held_out if split == "validation" else ~held_out
    return Digits(split, images[in_split], labels[in_split])


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
