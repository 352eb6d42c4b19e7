"""``text:PATH``: a text file, or a folder of them, split into documents."""

import os
from collections.abc import Iterator

from genai_jax.config import ConfigError

_MIN_CHARACTERS = 2_000  # from this length on, a group of paragraphs ends at the next blank line
_MAX_CHARACTERS = 8_000  # from this length on, at the next line break: there may be no blank lines


def read(path: str, *, strict: bool) -> list[str]:
    """Reads the documents under `path`.

    In a folder, each file is a document, sorted by relative path; hidden files are skipped. A
    single file is split at form feeds or, if it has none, into groups of paragraphs.

    Args:
      path: a file or a folder.
      strict: reject bytes that are not UTF-8. Otherwise they become lone surrogates
        (``errors="surrogateescape"``), from which the bytes can be recovered.

    Raises:
      ConfigError: nothing at `path`, no text in it, or a file that cannot be read.
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
        raise ConfigError(f"text:{path} is empty: it has no text to train on")
    return documents


def _files(folder: str) -> list[str]:
    paths = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [os.path.join(parent, name) for name in names if not name.startswith(".")]
    files = [path for path in paths if os.path.isfile(path)]  # no sockets, no dangling links
    return sorted(files, key=lambda file: os.path.relpath(file, folder).split(os.sep))


def _decode(file: str, strict: bool) -> str:
    try:
        with open(file, "rb") as stream:
            data = stream.read()
        return data.decode("utf-8", "strict" if strict else "surrogateescape")
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from None
    except MemoryError:
        size = os.path.getsize(file)
        raise ConfigError(f"cannot read {file}: its {size:,} bytes do not fit in memory") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file} is not UTF-8 (byte {data[error.start]:#04x} at offset {error.start}): "
            "convert it, or read its raw bytes with --data.tokenizer=bytes"
        ) from None


def _split(text: str) -> list[str]:
    if "\f" in text:
        return text.split("\f")
    return list(_paragraph_groups(text))


def _paragraph_groups(text: str) -> Iterator[str]:
    """Cuts after blank lines; the concatenation of the groups is the text."""
    group, size = [], 0
    for line in text.splitlines(keepends=True):
        group.append(line)
        size += len(line)
        if size >= _MAX_CHARACTERS or (size >= _MIN_CHARACTERS and not line.strip()):
            yield "".join(group)
            group, size = [], 0
    if group:
        yield "".join(group)
