"""Which classes to sample, and sampling many images with one compiled program."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from genai_jax.config import ConfigError
from genai_jax.media import checked_levels
from genai_jax.training.distributed import to_host

BATCH = 250  # images sampled at once, at most


def all_labels(sizes: tuple[int, ...]) -> np.ndarray:
    """Every combination of attributes, [combinations, attributes]."""
    return np.stack([x.ravel() for x in np.indices(sizes)], 1).astype(np.int32)


def cycled(rows: Any, count: int) -> np.ndarray:
    """Repeats the rows in order until there are `count`."""
    rows = np.asarray(rows)
    return rows[np.arange(count) % len(rows)]


def requested_labels(loader: Any, text: str, count: int) -> np.ndarray:
    """The labels of `count` images: a comma-separated list, or else all, repeated in order.

    Raises:
      ConfigError: a class that the data does not have, or more classes than images.
    """
    labels = [loader.parse_label(part) for part in text.split(",")] if text else []
    if len(labels) > count:
        raise ConfigError(
            f"--label={text} names {len(labels)} classes, more than --num_samples={count}"
        )
    return cycled(labels or all_labels(loader.label_sizes), count)


def check_label(text: str, conditional: bool):
    """Raises `ConfigError` if a class is requested from an unconditional model."""
    if text and not conditional:
        raise ConfigError(f"--label={text}: this model was trained without a condition")


def check_show_flags(request: Any, uses: dict[str, tuple[str, ...]]):
    """Raises `ConfigError` if a flag is set that the chosen value of `--show` does not use.

    Args:
      request: flags of the sample command, among them `show`.
      uses: value of `show` -> the flags that apply to it; flags listed nowhere apply to all.
    """
    for f in dataclasses.fields(request):
        users = [show for show, names in uses.items() if f.name in names]
        if users and request.show not in users and getattr(request, f.name) != f.default:
            raise ConfigError(
                f"--{f.name}={getattr(request, f.name)} is for --show={' or '.join(users)}, "
                f"not {request.show}"
            )


def in_batches(
    program: Callable, key: jax.Array, count: int, labels: np.ndarray | None = None
) -> np.ndarray:
    """Samples `count` images with calls of the same size.

    Args:
      program: (labels or None, key, rows) -> images [rows, ...] in levels, as `ArrayData.to_levels`
        gives them; rows is the same in every call.
      key: split into one key for each call.
      count: number of images.
      labels: of the images, [count, attributes].
    """
    rows = min(BATCH, count)
    images = []
    for i, begin in enumerate(range(0, count, rows)):
        batch_labels = None if labels is None else cycled(labels[begin : begin + rows], rows)
        batch = to_host(program(batch_labels, jax.random.fold_in(key, i), rows))
        images.append(checked_levels(batch))
    return np.concatenate(images)[:count]
