"""What a user's file holds: text, decompressed if need be, and nothing that is not text.

A file is recognized by its content. Its name says only what to do with it: decompress it (``.gz``,
``.zst``), and read it as a table or as plain text; see `genai_jax.data.text.tables`.
"""

import gzip
import io
import os
import re
import zlib
from typing import IO

from genai_jax.errors import ConfigError, printable
from genai_jax.files import MIB, open_regular, reason_of, unreadable

# A compressed file may hold so many times its own size, and in any case so many bytes. Text in a
# natural language compresses to a fifth, and logs to a thirtieth.
MAX_RATIO = 100
ALWAYS_ALLOWED = 64 * MIB
PARQUET = b"PAR1"
_COMPRESSED = {".gz": (b"\x1f\x8b", "gzip"), ".zst": (b"(\xb5/\xfd", "zstd")}
_SIGNATURES = {  # first bytes of files that are not text
    b"\x1f\x8b": "compressed (gzip)",
    b"(\xb5/\xfd": "compressed (zstd)",
    b"\xfd7zXZ\0": "compressed (xz)",
    b"BZh": "compressed (bzip2)",
    b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a": "a RAR archive",
    PARQUET: "a Parquet table",
    b"ARROW1\0\0": "an Arrow table",
    b"\x89HDF\r\n": "an HDF5 file",
    b"SQLite format 3\0": "an SQLite database",
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
    b"ID3\x02": "audio (MP3)",
    b"ID3\x03": "audio (MP3)",
    b"ID3\x04": "audio (MP3)",
    b"\x7fELF": "a program",
    b"\xcf\xfa\xed\xfe": "a program",
}
_NOT_IN_TEXT = bytes(c for c in range(32) if c not in b"\b\t\n\v\f\r\x1a\x1b") + b"\x7f"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class NotText(ConfigError):
    """A file that is not text; `kind` says what it is."""

    def __init__(self, path: str, kind: str):
        self.kind = kind
        super().__init__(
            f"{printable(path)} is {kind}: text:PATH reads plain text, tables named .jsonl, "
            ".csv, .tsv, or .parquet, and any of them compressed and named .gz or .zst"
        )


def format_of(path: str) -> str:
    """The suffix of a name that says how to read the file, in lower case: "A.CSV.gz" -> ".csv"."""
    stem, suffix = os.path.splitext(path.lower())
    return os.path.splitext(stem)[1] if suffix in _COMPRESSED else suffix


def read_content(path: str, limit: int) -> bytes:
    """The content of a file, decompressed if its name says that it is compressed.

    Args:
      path: a regular file.
      limit: most bytes to hold.

    Raises:
      NotText: it is a picture, an archive, a program, or something else that is not text. A Parquet
        table passes if its name ends in .parquet.
      ConfigError: it cannot be read, is damaged, larger than `limit`, or holds more than
        `MAX_RATIO` times its own size.
    """
    data = _read(path, limit)
    suffix = os.path.splitext(path.lower())[1]
    if suffix in _COMPRESSED and data:
        start, name = _COMPRESSED[suffix]
        if not data.startswith(start):
            _check_text(path, data)
            raise unreadable(path, f"it is not compressed by {name}, although named {suffix}")
        data = _decompressed(path, data, name, limit)
    if format_of(path) == ".parquet":
        if data and not data.startswith(PARQUET):
            _check_text(path, data)
            raise unreadable(path, "it is not a Parquet table, although named .parquet")
        return data
    _check_text(path, data)
    return data.removeprefix(_BYTE_ORDER_MARK)


def decode(path: str, data: bytes, *, strict: bool) -> str:
    """UTF-8 text; bytes that are not UTF-8 become lone surrogates unless `strict`.

    Raises:
      ConfigError: not UTF-8.
    """
    try:
        return data.decode("utf-8", "strict" if strict else "surrogateescape")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{printable(path)} is not UTF-8 (byte {data[error.start]:#04x} at offset "
            f"{error.start}): convert it, or read its raw bytes with --data.tokenizer=bytes"
        ) from None


def _read(path: str, limit: int) -> bytes:
    with open_regular(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            data = b"" if size > limit else file.read()
        except OSError as error:
            raise unreadable(path, reason_of(error)) from None
        except MemoryError:
            raise _too_large(path, size) from None
    if max(size, len(data)) > limit:
        raise _too_large(path, max(size, len(data)))
    return data


def _too_large(path: str, size: int) -> ConfigError:
    reason = (
        f"its {size:,} bytes are more than the memory here allows; TFDS data sets may be larger"
    )
    return unreadable(path, reason)


def allowed_size(data: bytes, limit: int) -> int:
    """Most bytes that compressed data may hold, where at most `limit` are allowed."""
    return min(max(ALWAYS_ALLOWED, MAX_RATIO * len(data)), limit)


def _decompressed(path: str, data: bytes, name: str, limit: int) -> bytes:
    allowed = allowed_size(data, limit)
    parts, size, stream = [], 0, _stream(path, data, name)
    try:
        while size <= allowed and (part := stream.read(MIB)):
            parts.append(part)
            size += len(part)
    except MemoryError:
        raise _too_large(path, size) from None
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise unreadable(path, f"its {name} data are damaged or cut ({reason_of(error)})") from None
    if size > limit:
        raise _too_large(path, size)
    if size > allowed:
        raise unreadable(
            path,
            f"it decompresses to more than {allowed:,} bytes, over {MAX_RATIO} times its own size; "
            "if you trust it, decompress it first",
        )
    return b"".join(parts)


def _stream(path: str, data: bytes, name: str) -> IO[bytes]:
    if name == "gzip":
        return gzip.GzipFile(fileobj=io.BytesIO(data))
    pyarrow = import_pyarrow(path)
    if not pyarrow.Codec.is_available("zstd"):
        raise unreadable(path, "the pyarrow that is installed was built without zstd")
    return pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd")


def import_pyarrow(path: str):
    """pyarrow, which reads `path`.

    Raises:
      ConfigError: it is not installed.
    """
    try:
        import pyarrow
    except ImportError:
        raise unreadable(
            path, 'this needs the package pyarrow: in the clone, pip install -e ".[tables]"'
        ) from None
    return pyarrow


def _check_text(path: str, data: bytes):
    """Raises `NotText` for what no text file contains, `ConfigError` for UTF-16."""
    if data.startswith(_UTF16) and len(data) % 2 == 0:
        raise ConfigError(f"{printable(path)} is UTF-16 text: convert it to UTF-8")
    for start, kind in _SIGNATURES.items():
        if data.startswith(start):
            raise NotText(path, kind)
    if data[:4] == b"RIFF" and data[8:12] in (b"WAVE", b"WEBP", b"AVI "):
        raise NotText(path, f"media ({data[8:12].decode().strip()})")
    if data[257:262] == b"ustar":
        raise NotText(path, "a tar archive")
    if re.match(rb"MZ[^\0]*\0|BM.{4}\0{4}", data[:64], re.DOTALL):
        raise NotText(path, "a program or a picture")
    # As git does; then also what is binary further on, but not a few stray bytes.
    odd = len(data) - len(data.translate(None, _NOT_IN_TEXT))
    if b"\0" in data[:8192] or odd * 1000 > len(data):
        kind = "NUL bytes" if b"\0" in data else "control characters"
        raise NotText(path, f"binary (it has {kind})")
