"""Reads files that a user or somebody else wrote: regular ones only, once, bounded in size.

A named pipe, a device, a link to itself, or a file that is too large, cut, or of another type is
refused in one line. Nothing here waits: a pipe without a writer is refused like any other.
"""

import contextlib
import json
import os
import pathlib
import stat
from collections.abc import Iterator
from typing import IO, Any

from genai_jax.errors import ConfigError, printable

MIB = 1 << 20
MAX_DEPTH = 64  # of nested JSON
MAX_DIGITS = 20  # of a whole number in JSON; those of 64 bits have fewer
KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip

Path = str | os.PathLike


def expand_home(path: str) -> str:
    """Replaces a leading ~ by the home folder, also after a prefix, as in text:~/books."""
    kind, colon, rest = path.partition(":")
    if colon and rest.startswith("~"):
        return f"{kind}:{os.path.expanduser(rest)}"
    return os.path.expanduser(path)


def open_regular(path: Path, label: str = "") -> IO[bytes]:
    """Opens a regular file for reading, without waiting.

    Args:
      path: the file.
      label: what an error calls it, such as ``--csv=runs.csv``; its path if empty.

    Raises:
      ConfigError: the file is missing, cannot be opened, or is not a regular file.
    """
    try:
        _check_regular(os.stat(path), path, label)  # before it is opened: that may act on a device
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        file = os.fdopen(descriptor, "rb")
        _check_regular(os.fstat(descriptor), path, label)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise unreadable(path, reason_of(error), label) from None
    return file


def read_bytes(path: Path, label: str = "", *, limit: int = 16 * MIB) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises:
      ConfigError: as `open_regular`; or the file is too large, or cannot be read.
    """
    with open_regular(path, label) as file:
        try:
            # Some file systems say that a file with content has size 0.
            large = os.fstat(file.fileno()).st_size > limit
            data = b"" if large else file.read(limit + 1)
        except OSError as error:
            raise unreadable(path, reason_of(error), label) from None
    if large or len(data) > limit:
        raise unreadable(path, f"it is larger than the {limit:,} bytes allowed here", label)
    return data


def read_text(path: Path, label: str = "", *, limit: int = 16 * MIB) -> str:
    """The text of a UTF-8 file, without a byte order mark, with lines that end in ``\\n``.

    Raises:
      ConfigError: as `read_bytes`, or the file is not UTF-8 text.
    """
    data = read_bytes(path, label, limit=limit)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"byte {data[error.start]:#04x} at offset {error.start}"
        raise unreadable(path, f"it is not UTF-8 text ({where})", label) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path, label: str = "", *, limit: int = 16 * MIB) -> Any:
    """The content of a JSON file.

    Raises:
      ConfigError: as `read_text`; or the file is not JSON, nests too deeply, or holds a number with
        too many digits.
    """
    text = read_text(path, label, limit=limit)
    try:
        return parse_json(text)
    except ValueError as error:
        raise unreadable(path, str(error), label) from None


def read_object(path: Path, label: str = "", *, limit: int = 16 * MIB) -> dict[str, Any]:
    """The content of a JSON file that holds one object.

    Raises:
      ConfigError: as `read_json`, or the JSON is not an object.
    """
    value = read_json(path, label, limit=limit)
    if not isinstance(value, dict):
        raise unreadable(path, f"it holds {_json_kind(value)}, not a JSON object", label)
    return value


def parse_json(text: str) -> Any:
    """Parses JSON, bounded in depth and in the digits of whole numbers.

    Raises:
      ValueError: invalid JSON or a violated bound; its message says which, in one line.
    """
    too_deep = ValueError(f"its JSON nests more than {MAX_DEPTH} levels deep")
    try:
        value = json.loads(text, parse_int=_whole_number)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not valid JSON: {error}") from None
    except RecursionError:
        raise too_deep from None
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise too_deep
        parts = [x.values() if isinstance(x, dict) else x for x in level if _is_nested(x)]
        level, depth = [child for part in parts for child in part if _is_nested(child)], depth + 1
    return value


def write_text(path: pathlib.Path, text: str):
    """Writes a text file in UTF-8 completely or not at all, whatever lies there.

    Bytes of a path that are not UTF-8 (surrogates) are escaped.

    Raises:
      OSError: it cannot be written.
    """
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_bytes(path: pathlib.Path, data: bytes):
    """Writes a file completely or not at all, whatever lies there.

    Raises:
      OSError: it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # a pipe would make us wait, a link lead elsewhere
    with open(temporary, "xb") as file:
        file.write(data)
    os.replace(temporary, path)


def endless_file(folder: pathlib.Path, limit: int, unlimited: str) -> str | None:
    """What of a folder, at any depth, could be read without end; None if nothing could.

    Args:
      folder: to look through. Links to files that are missing are left to the reader.
      limit: largest size of a file.
      unlimited: name of the folders whose files may be larger.
    """
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            try:
                status = os.stat(path)
            except OSError:
                continue
            if not stat.S_ISREG(status.st_mode):
                return f"{path} is {_kind(status.st_mode)}"
            if status.st_size > limit and os.path.basename(parent) != unlimited:
                return f"{path} is larger than {limit:,} bytes"
    return None


def unreadable(path: Path, reason: str, label: str = "") -> ConfigError:
    """The error of a file that cannot be read."""
    return ConfigError(f"cannot read {label or _shown(path)}: {reason}")


@contextlib.contextmanager
def writing_to(place: object) -> Iterator[None]:
    """Raises `ConfigError`, which names `place`, where what is inside cannot write."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and "null byte" not in str(error):
            raise
        raise ConfigError(f"cannot write to {place}: {reason_of(error)}") from None


def reason_of(error: BaseException) -> str:
    """Why a file cannot be opened or read, as part of a line."""
    if "null byte" in str(error):
        return "its path contains a NUL character"
    # A library may quote the file, which may hold what a terminal obeys.
    return printable(getattr(error, "strerror", None) or str(error))


def _shown(path: Path) -> str:
    text = os.fspath(path)
    return text if text.isprintable() and text.strip() == text != "" else repr(text)


def _check_regular(status: os.stat_result, path: Path, label: str):
    if not stat.S_ISREG(status.st_mode):
        raise unreadable(path, f"it is {_kind(status.st_mode)}, not a regular file", label)


def _kind(mode: int) -> str:
    return KINDS.get(stat.S_IFMT(mode), "a special file")


def _is_nested(value: Any) -> bool:
    return isinstance(value, dict | list)


def _json_kind(value: Any) -> str:
    kinds = {list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return kinds.get(type(value), "a number")


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_DIGITS + digits.startswith("-"):
        raise ValueError(f"its JSON has a number of {len(digits)} digits; {MAX_DIGITS} are allowed")
    return int(digits)
