"""Tables whose rows are documents: JSON lines, comma- and tab-separated values, Parquet."""

import contextlib
import csv
import functools
import io
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from genai_jax.data.text.contents import allowed_size, decode, format_of, import_pyarrow
from genai_jax.errors import ConfigError, printable
from genai_jax.files import parse_json, reason_of, unreadable

_SHOWN = 20  # names of columns in an error


def is_table(path: str) -> bool:
    """Whether the name of a file says that it is a table."""
    return format_of(path) in _READERS


class Column(NamedTuple):
    """The name of a column, or of a key in JSON, and the flag that it comes from."""

    name: str
    flag: str = "--data.text_key"

    def __str__(self) -> str:
        return f"{self.flag}={printable(self.name)}"


def read_rows(path: str, data: bytes, key: Column, *, strict: bool, limit: int) -> list[str | None]:
    """The text of each row of a table.

    Args:
      path: name of the file, which says what kind of table it is.
      data: its content.
      key: where the text is.
      strict: reject bytes that are not UTF-8; see `contents.decode`.
      limit: most bytes of text to hold.

    Returns:
      Strings; None for a row whose text is null.

    Raises:
      ConfigError: no such column, in which case the line names those that there are; a text that is
        not a string; or a damaged table.
    """
    reader = _READERS[format_of(path)]
    texts = list(reader(path, data, key, strict, limit))
    for number, text in enumerate(texts, 1):
        try:
            if text is not None:
                text.encode("utf-8", "strict" if strict else "surrogateescape")
        except UnicodeEncodeError as error:
            code = f"U+{ord(text[error.start]):04X}"
            reason = f"the text of row {number} has a lone surrogate ({code})"
            raise unreadable(path, reason) from None
    return texts


def _json_lines(
    path: str, data: bytes, key: Column, strict: bool, limit: int
) -> Iterator[str | None]:
    del limit  # no string is longer than its line
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(_line(path, line, number, strict))
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            raise unreadable(path, f"line {number}: {error}") from None
        if not isinstance(row, dict):
            raise unreadable(path, f"line {number} is not a JSON object")
        if key.name not in row:
            raise _no_column(path, key, list(row), f"line {number} has the keys")
        text = row[key.name]
        if not isinstance(text, str | None):
            reason = f"{key} of line {number} is not a string but {type(text).__name__}"
            raise unreadable(path, reason)
        yield text


def _line(path: str, line: bytes, number: int, strict: bool) -> str:
    try:
        return decode(path, line, strict=strict)
    except ConfigError as error:
        raise ConfigError(f"line {number} of {error}") from None


def _separated(
    path: str, data: bytes, key: Column, strict: bool, limit: int, *, delimiter: str
) -> Iterator[str | None]:
    del limit
    text = io.StringIO(decode(path, data, strict=strict), newline="")
    with _any_field_size():
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            header = next(reader, None)
            if header is None:
                return
            if header.count(key.name) != 1:
                raise _no_column(path, key, header, "its columns are")
            column = header.index(key.name)
            for row in reader:
                if row and len(row) != len(header):
                    reason = f"the row that ends in line {reader.line_num} has {len(row)} fields, "
                    raise unreadable(path, f"{reason}its header {len(header)}")
                if row:
                    yield row[column]
        except csv.Error as error:
            raise unreadable(path, f"line {reader.line_num}: {reason_of(error)}") from None


@contextlib.contextmanager
def _any_field_size() -> Iterator[None]:
    """While entered, `csv` reads fields of any size; it counts characters of data already held."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _parquet(path: str, data: bytes, key: Column, strict: bool, limit: int) -> Iterator[str | None]:
    pyarrow = import_pyarrow(path)
    failures = (pyarrow.ArrowException, OSError, ValueError, TypeError, LookupError, MemoryError)
    if not data:
        return
    try:
        for value in _column(pyarrow, path, data, key, allowed_size(data, limit)):
            yield None if value is None else decode(path, value, strict=strict)
    except ConfigError:
        raise
    except failures as error:
        raise unreadable(path, f"its Parquet data are damaged ({reason_of(error)[:200]})") from None


def _column(
    pyarrow: Any, path: str, data: bytes, key: Column, limit: int
) -> Iterator[bytes | None]:
    """The values of a column, whose sizes are added up before they are held."""
    import pyarrow.compute as compute
    import pyarrow.parquet as parquet

    schema = parquet.read_schema(pyarrow.BufferReader(data))
    names = schema.names
    if names.count(key.name) != 1:
        raise _no_column(path, key, names, "its columns are")
    types, kind = pyarrow.types, schema.field(key.name).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    tests = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    if not any(test(kind) for test in tests):
        raise unreadable(path, f"its column {printable(key.name)!r} has {kind} values, not text")
    # Read as a dictionary, a text that a small file repeats is held once.
    file = parquet.ParquetFile(pyarrow.BufferReader(data), read_dictionary=[key.name])
    size = 0
    for batch in file.iter_batches(1024, columns=[key.name]):
        column = batch.column(0)
        if types.is_dictionary(column.type):
            sizes = compute.binary_length(column.dictionary).take(column.indices)
        else:
            sizes = compute.binary_length(column)
        size += compute.sum(sizes).as_py() or 0
        if size > limit:
            raise unreadable(path, f"it holds more than {limit:,} bytes of text")
        yield from column.cast(pyarrow.large_binary()).to_pylist()


def _no_column(path: str, key: Column, names: list[str], has: str) -> ConfigError:
    shown = ", ".join(repr(printable(name[:80])) for name in names[:_SHOWN])
    shown += f", and {len(names) - _SHOWN} more" * (len(names) > _SHOWN)
    problem = "is the name of more than one column" if key.name in names else "is missing"
    return ConfigError(f"{key} {problem} in {printable(path)}: {has} {shown or 'none'}")


_READERS: dict[str, Callable[..., Any]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": functools.partial(_separated, delimiter=","),
    ".tsv": functools.partial(_separated, delimiter="\t"),
    ".parquet": _parquet,
}
