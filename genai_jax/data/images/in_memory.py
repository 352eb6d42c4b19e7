"""A split that is held in memory."""

import hashlib
from collections.abc import Sequence

import numpy as np


class MemoryImages:
    """Images with one label and a caption each; see `genai_jax.data.images.sources.ImageSource`.

    Args:
      name: the data set and the split.
      images: uint8 [examples, height, width, channels].
      labels: int32 [examples, 1].
      classes: names of the labels.
      captions: of each example.
      levels: values of the images are 0 .. levels - 1.
    """

    has_captions = True
    can_flip = False

    def __init__(
        self,
        name: str,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        classes: Sequence[str],
        captions: Sequence[str],
        levels: int,
    ):
        self.name, self.images, self.labels = name, images, labels
        self.shape, self.levels = images.shape[1:], levels
        self.label_names = (tuple(classes),)
        self._captions = captions

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        caption = self._captions[index]
        return {"image": self.images[index], "labels": self.labels[index], "caption": caption}

    def fingerprint(self) -> str:
        return hashlib.sha256(self.images.tobytes() + self.labels.tobytes()).hexdigest()
