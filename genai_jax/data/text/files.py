"""``text:PATH``: a text file, or a folder of them, split into documents."""

import os
from collections.abc import Iterator

from genai_jax.config import ConfigError, MissingFile
from genai_jax.data.folders import list_files, say

MIN_CHARACTERS = 2_000  # from this length on, a group of paragraphs ends at the next blank line
_MAX_CHARACTERS = 8_000  # from this length on, at the next line break: there may be no blank lines
_SIGNATURES = {  # first bytes of files that are not text
    b"\x1f\x8b": "compressed (gzip)",
    b"PK\x03\x04": "a zip archive",
    b"(\xb5/\xfd": "compressed (zstd)",
    b"\xfd7zXZ\0": "compressed (xz)",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"PAR1\x15": "a Parquet table",
    b"ARROW1\0\0": "an Arrow table",
    b"\x89HDF\r\n": "an HDF5 file",
    b"SQLite format 3\0": "an SQLite data base",
    b"\x93NUMPY": "a NumPy array",
    b"%PDF-": "a PDF",
    b"\x89PNG\r\n": "a picture (PNG)",
    b"\xff\xd8\xff": "a picture (JPEG)",
    b"GIF87a": "a picture (GIF)",
    b"GIF89a": "a picture (GIF)",
    b"II*\0": "a picture (TIFF)",
    b"MM\0*": "a picture (TIFF)",
    b"OggS\0": "audio (Ogg)",
    b"fLaC\0": "audio (FLAC)",
    b"ID3\x03": "audio (MP3)",
    b"ID3\x04": "audio (MP3)",
    b"\x7fELF": "a program",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}


def read(path: str, *, strict: bool) -> list[str]:
    """Reads the documents under `path`.

    In a folder, each file is a document, sorted by relative path. Hidden files and empty ones are
    skipped, which a line on stderr says; a linked folder is read once. A single file is split at
    form feeds or, if it has none, into groups of paragraphs.

    Args:
      path: a file or a folder.
      strict: reject bytes that are not UTF-8. Otherwise they become lone surrogates
        (``errors="surrogateescape"``), from which the bytes can be recovered.

    Raises:
      ConfigError: nothing at `path`, no text in it, or a file that cannot be read or is not text.
    """
    skipped = {}
    if os.path.isdir(path):
        files, skipped = list_files(path)
        documents = [_decode(file, strict) for file in files]
        skipped["empty"] = sum(not document.strip() for document in documents)
    elif os.path.isfile(path):
        documents = _split(_decode(path, strict))
    else:
        raise MissingFile(f"--data.dataset=text:{path}: no such file or folder", "data.dataset")
    documents = [document for document in documents if document.strip()]
    counts = ", ".join(f"{count} {kind}" for kind, count in skipped.items() if count)
    if not documents:
        note = f" (skipped: {counts})" if counts else ""
        raise ConfigError(f"text:{path} is empty: it has no text to train on{note}")
    if counts:
        say(f"note: text:{path}: skipped files: {counts}")
    return documents


def _decode(file: str, strict: bool) -> str:
    try:
        with open(file, "rb") as stream:
            data = stream.read()
        kind = next((kind for start, kind in _SIGNATURES.items() if data.startswith(start)), None)
        if kind:
            raise ConfigError(f"{file} is {kind}: text:PATH reads plain text in UTF-8 only")
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
        if size >= _MAX_CHARACTERS or (size >= MIN_CHARACTERS and not line.strip()):
            yield "".join(group)
            group, size = [], 0
    if group:
        yield "".join(group)
