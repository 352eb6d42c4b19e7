"""Decoded pictures, kept on disk between runs.

A file holds the pixels, then a JSON object with what went wrong while decoding, its length (8
bytes, little-endian), and the SHA-256 of all that. Its name is a hash of the encoded pictures and
of the shape they were decoded to. Whatever else lies there is ignored and replaced.
"""

import contextlib
import hashlib
import json
import math
import os
import pathlib
import tempfile
import time

import numpy as np

from genai_jax.data.folders import say
from genai_jax.errors import ConfigError
from genai_jax.files import open_regular, parse_json, reason_of

MAX_TOTAL = 8 << 30  # bytes of all files
SUFFIX = ".pixels"
ABANDONED_S = 3600  # age of a temporary file whose process has ended
PART = 1 << 24


def folder() -> pathlib.Path:
    base = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return base / "genai_jax" / "pictures"


def load(key: str, shape: tuple[int, ...]) -> tuple[np.ndarray, dict[str, str]] | None:
    """The pixels, uint8 of this shape, and the notes that were saved with them, if intact."""
    path = folder() / f"{key}{SUFFIX}"
    size = math.prod(shape)
    digest, pixels = hashlib.sha256(key.encode()), np.empty(size, np.uint8)
    try:
        with open_regular(path) as file:
            view = memoryview(pixels)
            for start in range(0, size, PART):
                part = view[start : start + PART]
                if file.readinto(part) != len(part):
                    return None
                digest.update(part)
            rest = file.read(PART)
            notes, length, expected = rest[:-40], rest[-40:-32], rest[-32:]
            digest.update(notes + length)
            if digest.digest() != expected or int.from_bytes(length, "little") != len(notes):
                return None
        os.utime(path)  # the least recently used are deleted first
        return pixels.reshape(shape), parse_json(notes.decode())
    except (ConfigError, OSError, ValueError):
        return None


def save(key: str, pixels: np.ndarray, notes: dict[str, str]):
    """Saves pixels completely or not at all; a failure is said and changes nothing."""
    text = json.dumps(notes).encode()
    if pixels.nbytes > MAX_TOTAL // 2 or len(text) > PART - 40:
        return
    place = folder()
    try:
        place.mkdir(parents=True, exist_ok=True)
        _make_room(place, pixels.nbytes)
        descriptor, temporary = tempfile.mkstemp(suffix=".tmp", dir=place)
        try:
            with os.fdopen(descriptor, "wb") as file:
                digest = hashlib.sha256(key.encode())
                view = memoryview(np.ascontiguousarray(pixels)).cast("B")
                parts = [view[i : i + PART] for i in range(0, len(view), PART)]
                for part in (*parts, text, len(text).to_bytes(8, "little")):
                    digest.update(part)
                    file.write(part)
                file.write(digest.digest())
            target = place / f"{key}{SUFFIX}"
            os.replace(temporary, target)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
    except OSError as error:
        say(f"note: the decoded pictures are not kept in {place}: {reason_of(error)}")


def _make_room(place: pathlib.Path, needed: int):
    """Deletes what was not used for longest until `needed` bytes fit, and abandoned files."""
    entries = []
    for path in place.iterdir():
        with contextlib.suppress(OSError):  # another process deletes it
            status = path.lstat()
            if path.suffix == ".tmp" and status.st_mtime < time.time() - ABANDONED_S:
                path.unlink()
            elif path.suffix == SUFFIX:
                entries.append((status.st_mtime, status.st_size, path))
    total = needed + sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= MAX_TOTAL:
            return
        with contextlib.suppress(OSError):
            path.unlink()
            total -= size
