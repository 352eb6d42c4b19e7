"""Random access to images, signals and video, split into train and validation."""

import difflib
from typing import Any, Protocol

from genai_jax.config import ConfigError, refuse_set
from genai_jax.data.images import digits, emoji, mnist, shapes, waves
from genai_jax.data.own_code import SPLITS, own_data

# image: uint8 [*space, channels]; labels: int32 [attributes]; caption: str
Example = dict[str, Any]

BUILT_IN = {
    "digits": digits.open_digits,
    "shapes": shapes.open_shapes,
    "moving_shapes": shapes.open_moving_shapes,
    "waves": waves.open_waves,
    "mnist": mnist.open_mnist,
    "emoji": emoji.open_emoji,
}
# A user's own pictures, read by `genai_jax.data.images.own_pictures`; each takes a path.
OWN = ("images", "hf", "webdataset")


class ImageSource(Protocol):
    """Examples of one split.

    Attributes:
      name: the data set and the split.
      shape: (*space, channels) of every example.
      levels: values are 0 .. levels - 1.
      label_names: the names of the values of each labeled attribute.
      has_captions: whether examples have captions.
      can_flip: whether labels and caption still hold for a mirror image.
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
        """sha256 of the split's contents, in hex."""
        ...


def open_images(config, split: str) -> ImageSource:
    """Opens one split of ``config.dataset``.

    Args:
      config: an `ImageDataConfig`.
      split: "train" or "validation".

    Raises:
      ConfigError: an unknown data set, or a setting that it does not support.
    """
    if split not in SPLITS:
        raise ConfigError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    name = config.dataset
    if name in BUILT_IN:
        if name != "moving_shapes":
            refuse_set("data", config, ["num_frames"], f"applies only to moving_shapes, not {name}")
        of_others = ("data_dir", "image_key", "label_key", "caption_key")
        refuse_set("data", config, of_others, f"does not apply to {name}")
        source = BUILT_IN[name](config, split)
    elif name.partition(":")[0] in OWN and ":" in name:
        from genai_jax.data.images import own_pictures

        source = own_pictures.open_own(config, split)
    elif own_data(name):
        from genai_jax.data.images import own_arrays

        source = own_arrays.open_own_arrays(config, split)
    else:
        near = difflib.get_close_matches(name, [*BUILT_IN, *OWN], n=1)
        if near and near[0] in OWN:
            near = [f"{near[0]}:PATH"]
        if near:
            raise ConfigError(f"unknown data set {name!r}: did you mean {near[0]}?")
        from genai_jax.data.images import tfds as tfds_images

        built_in = [*sorted(BUILT_IN), *(f"{kind}:PATH" for kind in OWN)]
        source = tfds_images.open_tfds_images(config, split, built_in=built_in)
    if config.flip and not source.can_flip:
        raise ConfigError(
            f"--data.flip: a mirror image of an example of {name} is not a valid example"
        )
    if config.captions and not source.has_captions:
        raise ConfigError(f"--data.captions: {name} has no captions")
    if not config.captions:
        of_captions = ("caption_key", "caption_length", "tokenizer")
        refuse_set("data", config, of_captions, "has no effect without --data.captions")
    return source
