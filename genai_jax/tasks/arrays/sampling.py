"""Which classes are drawn, and drawing many images with one compiled program."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from genai_jax.config import ConfigError

BATCH = 250  # images drawn at once at most


def all_labels(sizes: tuple[int, ...]) -> np.ndarray:
    """Every combination of attributes, [combinations, attributes]."""
    return np.stack([x.ravel() for x in np.indices(sizes)], 1).astype(np.int32)


def cycled(rows: Any, count: int) -> np.ndarray:
    """The rows, again and again, until there are `count`."""
    rows = np.asarray(rows)
    return rows[np.arange(count) % len(rows)]


def requested_labels(loader: Any, text: str, count: int) -> np.ndarray:
    """The labels of `count` images: those a user names, comma-separated, or all, in turn.

    Raises:
      ConfigError: a class that the data does not have.
    """
    wanted = [loader.parse_label(part) for part in text.split(",") if part]
    return cycled(wanted or all_labels(loader.label_sizes), count)


def check_label(text: str, conditional: bool):
    """Raises `ConfigError` if a class is asked of a model that was not told any."""
    if text and not conditional:
        raise ConfigError(f"--label={text}: this model was trained without a condition")


def check_show_flags(request: Any, uses: dict[str, tuple[str, ...]]):
    """Raises `ConfigError` if a flag is set that what is to be shown does not use.

    Args:
      request: flags of the sample command, among them `show`.
      uses: what can be shown -> the flags that are for it; flags named nowhere are for all.
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
    """Draws `count` images with calls of one size.

    Args:
      program: (labels or None, key, rows) -> images [rows, ...]; rows is the same in every call.
      key: each call gets one of its own.
      count: how many.
      labels: [count, attributes], of an image each.
    """
    rows = min(BATCH, count)
    made = []
    for i, begin in enumerate(range(0, count, rows)):
        told = None if labels is None else cycled(labels[begin : begin + rows], rows)
        made.append(np.asarray(program(told, jax.random.fold_in(key, i), rows)))
    return np.concatenate(made)[:count]
