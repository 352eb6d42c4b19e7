"""Encoded pictures with labels and captions, as the readers of folders and shards give them."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from genai_jax.errors import ConfigError

# Names of a part that the data set itself holds out, the first that there is.
HELD_OUT_NAMES = ("validation", "valid", "val", "dev", "test")
MAX_BYTES = 1 << 28  # of one encoded picture
CAPTION_KEYS = ("text", "caption")  # where captions are if no flag names a column


class Records(NamedTuple):
    """Random access to encoded pictures, in an order that does not depend on where they lie.

    Attributes:
      places: the file, row, or member of each, for warnings.
      read: index -> the encoded picture; raises `ConfigError` if it cannot be read.
      classes: names of the classes; empty without labels.
      labels: index of the class of each, int32 [records].
      captions: of each; None without captions.
      held_out: whether each is in the part that the data set itself holds out; None if it has none.
      notes: what to say of the data before training.
      files: all files that were read, which must not change.
    """

    places: Sequence[str]
    read: Callable[[int], bytes]
    classes: tuple[str, ...] = ()
    labels: np.ndarray | None = None
    captions: Sequence[str] | None = None
    held_out: np.ndarray | None = None
    notes: Sequence[str] = ()
    files: Sequence[str] = ()


def classes_of(values: Sequence[Any], where: str) -> tuple[tuple[str, ...], np.ndarray]:
    """The names of the classes, sorted (numbers by size), and the index of each value.

    Args:
      values: class names, or numbers.
      where: what holds them, for the error.

    Raises:
      ConfigError: a value is missing, or neither a text nor a whole number.
    """
    for value in values:
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise ConfigError(
                f"{where} holds {value!r}, which is not a class: use a text or a whole number for "
                "every picture, or --data.label_key= for no labels"
            )
    texts = [str(value).strip() for value in values]
    numbers = all(text.removeprefix("-").isdecimal() and text.isascii() for text in texts)
    names = sorted(set(texts), key=(lambda text: (int(text), text)) if numbers else None)
    index = {name: i for i, name in enumerate(names)}
    return tuple(names), np.array([index[text] for text in texts], np.int32)


def chosen_key(flag: str, key: str, default: str, there: Iterable[str], where: str) -> str | None:
    """`key` if it is there; None if it is empty, or the default and not there.

    Raises:
      ConfigError: a key that a flag names is not there.
    """
    there = list(there)
    if key in there:
        return key
    if key in ("", default):
        return None
    names = ", ".join(map(str, there)) or "none"
    raise ConfigError(f"--data.{flag}={key}: {where} has {names}")


def chosen_caption_key(config: Any, there: Iterable[str], where: str) -> str | None:
    """The key of the captions: the one that a flag names, or a usual one."""
    there = list(there)
    if config.caption_key:
        return chosen_key("caption_key", config.caption_key, "", there, where)
    return next((key for key in CAPTION_KEYS if key in there), None)


def some(places: Sequence[str]) -> str:
    """Names the first of some places, and how many more there are."""
    more = f" and {len(places) - 3:,} more" if len(places) > 3 else ""
    return ", ".join(places[:3]) + more
