"""Random access to images, signals and video, split into train and validation."""

import difflib
from typing import Any, Protocol

from genai_jax.config import ConfigError
from genai_jax.data.images import digits, shapes, waves
from genai_jax.data.text.sources import SPLITS

Example = dict[
    str, Any
]  # image: uint8 [*space, channels]; labels: int32 [attributes]; caption: str

DRAWN = {
    "digits": digits.open_digits,
    "shapes": shapes.open_shapes,
    "moving_shapes": shapes.open_moving_shapes,
    "waves": waves.open_waves,
}


class ImageSource(Protocol):
    """Examples of one split.

    Attributes:
      name: of the data set and the split.
      shape: (*space, channels) of every example.
      levels: values are 0 .. levels - 1.
      label_names: for each attribute that is labelled, the names of its values.
      has_captions: whether examples have a text.
      can_flip: whether a mirror image keeps its labels and its caption.
    """

    name: str
    shape: tuple[int, ...]
    levels: int
    label_names: tuple[tuple[str, ...], ...]
    has_captions: bool
    can_flip: bool

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def fingerprint(self) -> str:
        """sha256, in hex, of what the split holds."""
        ...


def open_images(config, split: str) -> ImageSource:
    """Opens one split of ``config.dataset``.

    Args:
      config: an `ImageDataConfig`.
      split: "train" or "validation".

    Raises:
      ConfigError: no such data set, or a setting that it cannot honour.
    """
    if split not in SPLITS:
        raise ConfigError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    name = config.dataset
    if name in DRAWN:
        if config.num_frames is not None and name != "moving_shapes":
            raise ConfigError(f"--data.num_frames={config.num_frames} is for moving_shapes alone")
        source = DRAWN[name](config, split)
    else:
        near = difflib.get_close_matches(name, DRAWN, n=1)
        if near:
            raise ConfigError(f"unknown data set {name!r}: did you mean {near[0]}?")
        from genai_jax.data.images import tfds as tfds_images

        source = tfds_images.open_tfds_images(config, split, drawn=sorted(DRAWN))
    if config.flip and not source.can_flip:
        raise ConfigError(f"--data.flip: a mirror image of {name} is no example of {name}")
    if config.captions and not source.has_captions:
        raise ConfigError(f"--data.captions: {name} has no captions")
    return source
