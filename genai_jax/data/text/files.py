"""``text:PATH``: a file or a folder of text, cut into documents."""

import os
from collections.abc import Iterator

from genai_jax.config import ConfigError

_PARAGRAPHS = 2_000  # characters in a document made of paragraphs, at least
_LINES = 8_000  # characters after which a document may also end at any line: there may be no blank


def read(path: str, *, strict: bool) -> list[str]:
    """Reads the documents under `path`.

    A folder gives one document a file, sorted by relative path, without hidden files. A file gives
    one document between form feeds or, if it has none, groups of paragraphs.

    Args:
      path: a file or a folder.
      strict: refuse bytes that are not UTF-8. Otherwise they become lone surrogates
        (``errors="surrogateescape"``), from which they can be had back.
    """
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        documents = [_decode(file, strict) for file in _files(path)]
    elif os.path.isfile(path):
        documents = _split(_decode(path, strict))
    else:
        raise ConfigError(f"text:{path}: no such file or folder")
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise ConfigError(f"text:{path} is empty: there is no text in it to train on")
    return documents


def _files(folder: str) -> list[str]:
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(parent, name) for name in names if not name.startswith(".")]
    files = [file for file in found if os.path.isfile(file)]  # not sockets, not dangling links
    return sorted(files, key=lambda file: os.path.relpath(file, folder).split(os.sep))


def _decode(file: str, strict: bool) -> str:
    try:
        with open(file, "rb") as stream:
            data = stream.read()
        return data.decode("utf-8", "strict" if strict else "surrogateescape")
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file} is not UTF-8 (byte {data[error.start]:#04x} at offset {error.start}): "
            "convert it, or read it as it is with --data.tokenizer=bytes"
        ) from None


def _split(text: str) -> list[str]:
    if "\f" in text:
        return text.split("\f")
    return list(_paragraph_groups(text))


def _paragraph_groups(text: str) -> Iterator[str]:
    """Cuts behind a blank line; joined again, the groups are the text."""
    group, size = [], 0
    for line in text.splitlines(keepends=True):
        group.append(line)
        size += len(line)
        if size >= _LINES or (size >= _PARAGRAPHS and not line.strip()):
            yield "".join(group)
            group, size = [], 0
    if group:
        yield "".join(group)
