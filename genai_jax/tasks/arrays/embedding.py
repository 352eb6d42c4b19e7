"""What models compute about images: features and latents, many images with one program."""

from collections.abc import Callable
from typing import Any

import numpy as np

from genai_jax.config import ConfigError
from genai_jax.tasks.arrays.data import ArrayData
from genai_jax.tasks.arrays.sampling import cycled
from genai_jax.training.distributed import to_host

BATCH = 256  # images at once, at most
HELD_OUT = 1000  # images that are embedded if none are given


def in_parts(program: Callable[..., Any], *arrays: np.ndarray | None) -> list[np.ndarray]:
    """Calls a program on parts of the rows of arrays, all of one size; its arrays as one.

    Args:
      program: arrays [rows, ...], or None where an argument is None -> array or tuple of arrays
        [rows, ...].
      arrays: the first has rows.

    Returns:
      Host arrays, one for each that the program returns.
    """
    count = len(arrays[0])
    size, parts = min(count, BATCH), []
    for begin in range(0, count, size):
        part = [None if x is None else cycled(x[begin : begin + size], size) for x in arrays]
        result = to_host(program(*part))
        result = result if isinstance(result, tuple | list) else (result,)
        parts.append([x[: count - begin] for x in result])
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def embedded(
    data: ArrayData, images: Any, program: Callable[..., Any], labels: bool = False
) -> np.ndarray:
    """Features or latents of images, float32.

    Args:
      data: of the run.
      images: levels [n, *space, channels], integers; None for held-out images.
      program: (images, labels or None) -> array [rows, ...].
      labels: whether the model needs the classes of the images, which only held-out ones have.

    Raises:
      ConfigError: images of another shape or range, or without their classes.
    """
    classes = None
    if images is None:
        held_out = data.loader.examples("validation", HELD_OUT)
        images, classes = held_out["image"], held_out["labels"] if labels else None
    elif labels:
        raise ConfigError("this model needs classes: only held-out images can be embedded")
    images = np.asarray(images)
    if images.shape[1:] != data.shape or not len(images) or images.dtype.kind not in "iu":
        raise ConfigError(
            f"images are {images.dtype} {list(images.shape)}; this model takes integers of shape "
            f"[n, {', '.join(map(str, data.shape))}]"
        )
    if images.min() < 0 or images.max() >= data.levels:
        raise ConfigError(
            f"images have values from {images.min()} to {images.max()}; this model takes 0 to "
            f"{data.levels - 1}"
        )
    (result,) = in_parts(program, images.astype(np.uint8), classes)
    return result.astype(np.float32)
