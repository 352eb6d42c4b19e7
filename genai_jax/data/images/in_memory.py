"""A split that is held in memory."""

import hashlib
from collections.abc import Sequence

import numpy as np


class MemoryImages:
    """Images with a label and a caption each; see `genai_jax.data.images.sources.ImageSource`.

    Args:
      name: the data set and the split.
      images: uint8 [examples, height, width, channels].
      labels: int32 [examples, 1]; None without labels.
      classes: names of the labels.
      captions: of each example; None without captions.
      levels: values of the images are 0 .. levels - 1.
      can_flip: whether labels and captions still hold for a mirror image.
    """

    def __init__(
        self,
        name: str,
        images: np.ndarray,
        labels: np.ndarray | None,
        *,
        classes: Sequence[str],
        captions: Sequence[str] | None,
        levels: int,
        can_flip: bool = False,
    ):
        self.name, self.images, self.labels = name, images, labels
        self.shape, self.levels, self.can_flip = images.shape[1:], levels, can_flip
        self.label_names = () if labels is None else (tuple(classes),)
        self.has_captions, self._captions = captions is not None, captions

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        example = {"image": self.images[index]}
        if self.labels is not None:
            example["labels"] = self.labels[index]
        if self.has_captions:
            example["caption"] = self._captions[index]
        return example

    def fingerprint(self) -> str:
        labels = b"" if self.labels is None else self.labels.tobytes()
        return hashlib.sha256(self.images.tobytes() + labels).hexdigest()
