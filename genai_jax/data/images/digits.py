"""The 8x8 handwritten digits that come with scikit-learn: real data without a download.

1,797 images of 17 grey levels: the test part of "Optical Recognition of Handwritten Digits"
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
    """One split, in memory."""

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
    chosen = held_out if split == "validation" else ~held_out
    return Digits(split, images[chosen], labels[chosen])


def pixel_documents(validation_percent: int, split: str) -> list[str]:
    """The images of a split as texts "= p0 p1 ...", grey levels in raster order.

    The same split as `open_digits`. With ``--data.answer_after==`` exactly the pixels are targets.
    """
    images, _ = _load()
    held_out = _held_out(validation_percent)
    chosen = images[held_out if split == "validation" else ~held_out]
    return ["= " + " ".join(map(str, image.ravel().tolist())) for image in chosen]


@functools.cache
def _load() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = data.images.astype(np.uint8)[..., None]
    return images, data.target.astype(np.int32)[:, None]


@functools.cache
def _held_out(percent: int) -> np.ndarray:
    """Whether each image is held out: of each digit the share with the smallest content hashes."""
    images, labels = _load()
    hashes = np.array([hashlib.sha256(x.tobytes()).hexdigest() for x in images])
    chosen = np.zeros(len(images), bool)
    for digit in range(len(NAMES)):
        (mine,) = np.nonzero(labels[:, 0] == digit)
        order = mine[np.argsort(hashes[mine])]
        chosen[order[: max(1, len(mine) * percent // 100)]] = True
    return chosen
