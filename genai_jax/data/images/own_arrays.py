"""Images that a function outside this project returns; see `genai_jax.data.own_code`."""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from genai_jax.config import ConfigError, refuse_set
from genai_jax.data.folders import say
from genai_jax.data.images.decoding import resized
from genai_jax.data.images.in_memory import MemoryImages
from genai_jax.data.images.splits import hold_out_pictures
from genai_jax.data.own_code import SPLITS, read_own
from genai_jax.outside import load_outside

SOURCE = (
    "name", "shape", "levels", "label_names", "has_captions", "can_flip", "fingerprint",
    "__len__", "__getitem__",
)  # fmt: skip


class Examples(NamedTuple):
    """Images, signals, or videos in memory, for a data set of your own.

    Attributes:
      images: uint8 [examples, *space, channels].
      labels: class of each, ints [examples]; None without classes.
      classes: names of the classes; their numbers if None.
      captions: of each; None without captions.
      levels: values of the images are 0 .. levels - 1.
      can_flip: whether labels and captions still hold for a mirror image.
    """

    images: np.ndarray
    labels: np.ndarray | None = None
    classes: Sequence[str] | None = None
    captions: Sequence[str] | None = None
    levels: int = 256
    can_flip: bool = True


def open_own_arrays(config: Any, split: str) -> Any:
    """One split of the images that the function returned.

    It returns `Examples`, which are split by the hash of the image, or a mapping with "train" and
    "validation" to `Examples` or, for data that do not fit into memory, to objects like
    `genai_jax.data.images.sources.ImageSource`.

    Raises:
      ConfigError: something else was returned.
    """
    function = load_outside("--data.dataset", config.dataset)  # a reloaded one is another
    examples = _splits(config, function)[split]
    if not isinstance(examples, Examples):
        return examples
    return MemoryImages(
        f"{config.dataset}[{split}]",
        examples.images,
        None if examples.labels is None else examples.labels.astype(np.int32)[:, None],
        classes=examples.classes if examples.labels is not None else (),
        captions=examples.captions,
        levels=examples.levels,
        can_flip=examples.can_flip,
    )


@functools.lru_cache(maxsize=1)
def _splits(config: Any, function: Any) -> dict[str, Any]:
    """Split -> its examples, or an object that reads them; the last data set is remembered."""
    del function  # which `read_own` calls
    returned, flag = read_own(config), f"--data.dataset={config.dataset}"
    if isinstance(returned, Mapping):
        why = f"has no effect: {config.dataset} returned the examples of each split"
        refuse_set("data", config, ["validation_percent"], why)
        splits = dict(returned)
    else:
        splits = _parts(_checked(returned, flag), config.validation_percent)
    for split, examples in splits.items():
        if not isinstance(examples, Examples) and all(hasattr(examples, a) for a in SOURCE):
            continue
        examples = _checked(examples, flag)
        if not len(examples.images):
            raise ConfigError(f"{flag} has no examples for {split}")
        images = _of_size(examples.images, config.image_size, examples.levels, flag)
        splits[split] = examples._replace(images=images)
    _check_alike(splits, flag)
    return splits


def _check_alike(splits: dict[str, Any], flag: str):
    """Raises `ConfigError` for splits of different kinds; says what the examples are."""
    kinds = []
    for examples in splits.values():
        source = not isinstance(examples, Examples)
        shape = tuple(examples.shape if source else examples.images.shape[1:])
        names = examples.label_names if source else (tuple(examples.classes or ()),)
        kinds.append((shape, examples.levels, tuple(map(tuple, names))))
    for what, train, held_out in zip(("shape", "levels", "classes"), *kinds, strict=True):
        if train != held_out:
            raise ConfigError(f"{flag}: {what} of train and validation differ: {train}, {held_out}")
    (*space, channels), _, names = kinds[0]
    kind = ("signals of length", "images of", "videos of")[min(len(space), 3) - 1]
    classes = ", ".join(names[0][:12]) if names and names[0] else "none"
    counts = [len(x.images if isinstance(x, Examples) else x) for x in splits.values()]
    say(
        f"note: {flag.partition('=')[2]}: {counts[0]:,} train and {counts[1]:,} validation "
        f"{kind} {'x'.join(map(str, space))} with {channels} channel(s); classes: {classes}"
    )


def _checked(returned: Any, flag: str) -> Examples:
    """The examples, with labels as an array and names for all of them."""
    where = "genai_jax.data.images.own_arrays.Examples"
    if not isinstance(returned, Examples):
        raise ConfigError(
            f"{flag} returned a {type(returned).__name__}, not {where}, or a mapping of train and "
            "validation to them"
        )
    images, labels, classes = returned.images, returned.labels, returned.classes
    if getattr(images, "dtype", None) != np.uint8 or images.ndim < 3:
        raise ConfigError(f"{flag}: images are not an array of uint8 [examples, *space, channels]")
    if images.ndim > 3 and images.shape[-1] not in (1, 3):
        raise ConfigError(f"{flag}: images have {images.shape[-1]} channels; 1 and 3 are supported")
    if not 2 <= returned.levels <= 256 or int(images.max(initial=0)) >= returned.levels:
        raise ConfigError(
            f"{flag}: images have values outside 0 .. levels - 1, with levels={returned.levels}"
        )
    for name, values in (("labels", labels), ("captions", returned.captions)):
        if values is not None and len(values) != len(images):
            raise ConfigError(f"{flag} has {len(images)} images, but {len(values)} {name}")
    if labels is None:
        return returned
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or labels.min(initial=0) < 0:
        raise ConfigError(f"{flag}: labels are not whole numbers from 0, [examples]")
    if classes is None:
        classes = [str(i) for i in range(int(labels.max(initial=0)) + 1)]
    if labels.max(initial=0) >= len(classes):
        raise ConfigError(f"{flag} has the label {labels.max()}, but {len(classes)} classes")
    return returned._replace(labels=labels, classes=tuple(map(str, classes)))


def _parts(examples: Examples, percent: int) -> dict[str, Examples]:
    """The examples of each split; copies of an image are on the same side."""
    digests = [hashlib.sha256(image.tobytes()).digest() for image in examples.images]
    usable = np.ones(len(digests), bool)
    held_out = hold_out_pictures(digests, usable, examples.labels, percent)

    def part(rows: np.ndarray) -> Examples:
        labels, captions = examples.labels, examples.captions
        return examples._replace(
            images=examples.images[rows],
            labels=None if labels is None else labels[rows],
            captions=None if captions is None else [captions[i] for i in rows],
        )

    return {s: part(np.flatnonzero(held_out == (s == "validation"))) for s in SPLITS}


def _of_size(images: np.ndarray, size: int | None, levels: int, flag: str) -> np.ndarray:
    """Images cropped and resized to a square of this size, if it is not None."""
    space, channels = images.shape[1:-1], images.shape[-1]
    if size is None or set(space) == {size}:
        return images
    if len(space) != 2 or channels not in (1, 3):
        raise ConfigError(
            f"--data.image_size={size}: {flag} has examples of shape {images.shape[1:]}, which are "
            "not resized"
        )
    shape = (size, size, channels)
    return np.stack([np.minimum(resized(image, shape), levels - 1) for image in images])
