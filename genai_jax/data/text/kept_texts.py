"""Texts that take seconds to extract from files, kept for later commands of the same user.

They are in ``genai_jax/NAME`` in ``$XDG_CACHE_HOME``, by default in ``~/.cache``, as text that is
never executed.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Sequence

from genai_jax.errors import ConfigError
from genai_jax.files import MIB, read_object, read_text

EXTRACTING = ("packages.py", "stdlib.py")
KEPT = 4  # files of each name, the newest: those of several versions of Python and environments


def kept_texts(
    name: str, files: Sequence[tuple[str, str]], extract: Callable[[], list[str]]
) -> list[str]:
    """What `extract` returns, or has returned for the same files, read by the same Python.

    A folder that cannot be read or written costs time and nothing else.

    Args:
      name: of the texts, and of their folder.
      files: (name that counts, path) of what the texts come from; a file that has another size or
        time of change is another one.
      extract: called if nothing is kept for these files, or the code that reads them has changed.
    """
    key = _key(files)
    try:
        root = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:  # a user without a home
        return extract()
    path = root / "genai_jax" / name / f"{key[:16]}.json"
    texts = _read(path, key)
    if texts is None:
        texts = extract()
        _write(path, {"key": key, "sha256": _digest(texts), "documents": texts})
    return texts


def _key(files: Sequence[tuple[str, str]]) -> str:
    """A hash of what identifies the files, and how they are read."""
    stats = ((file, os.stat(path)) for file, path in files)
    facts = [[file, stat.st_size, stat.st_mtime_ns] for file, stat in stats]
    code = [read_text(pathlib.Path(__file__).with_name(name)) for name in EXTRACTING]
    text = json.dumps([code, sys.version, facts])
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _read(path: pathlib.Path, key: str) -> list[str] | None:
    """The texts that were kept; None if there are none, or they are damaged."""
    try:
        kept = read_object(path, limit=512 * MIB)
    except ConfigError:
        return None
    texts = kept.get("documents")
    if kept.get("key") != key or not isinstance(texts, list):
        return None
    if not all(isinstance(text, str) for text in texts):
        return None
    return texts if kept.get("sha256") == _digest(texts) else None


def _write(path: pathlib.Path, content: dict):
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Several commands may write at once, each a file of its own.
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".draft", delete=False) as f:
            f.write(json.dumps(content).encode())
        os.replace(f.name, path)
        files = sorted(path.parent.iterdir(), key=lambda file: -file.stat().st_mtime)
        for file in files[KEPT:]:
            file.unlink()


def _digest(texts: list[str]) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()
