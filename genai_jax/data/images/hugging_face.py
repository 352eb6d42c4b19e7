"""``hf:PATH``: a Hugging Face data set on disk, read with PyArrow alone.

PATH is what `save_to_disk` wrote (Arrow files), a folder of Parquet files, or one such file. Images
are a column of {bytes, path}, or of bytes; files that a row merely names are not opened.
"""

import bisect
import contextlib
import functools
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from genai_jax.data.images.decoding import Undecodable
from genai_jax.data.images.picture_folder import files_of
from genai_jax.data.images.records import (
    HELD_OUT_NAMES,
    MAX_BYTES,
    Records,
    chosen_caption_key,
    chosen_key,
    classes_of,
    some,
)
from genai_jax.errors import ConfigError, printable
from genai_jax.files import open_regular, parse_json, reason_of, unreadable

ARROW, PARQUET = ".arrow", ".parquet"
MAX_GROUP = 1 << 31  # bytes of a row group of a Parquet file
GROUPS_KEPT = 4
CACHE = "cache-"  # how names of files begin in which the `datasets` library keeps results


def read_hugging_face(config: Any) -> Records:
    """The rows of a data set, in order.

    A part named validation or test, if there is one, is held out.

    Raises:
      ConfigError: no data set, damaged files, or no such columns.
    """
    path = config.dataset.removeprefix("hf:")
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise ConfigError(
            f"--data.dataset={config.dataset} is read with the package pyarrow, which is not "
            "installed: pip install pyarrow"
        ) from None
    files, notes = files_of(path, (ARROW, PARQUET), "hf")
    files = [file for file in files if not os.path.basename(file).startswith(CACHE)] or files
    files, held_out_files, more = _parts(path, files)
    files += held_out_files
    tables = [_Parquet(f) if f.endswith(PARQUET) else _Arrow(f) for f in files]
    where = printable(config.dataset)
    columns = tables[0].schema.names
    for table in tables:
        if table.schema.names != columns:
            raise ConfigError(
                f"{where}: {table.file} has the columns {', '.join(table.schema.names)}, but "
                f"{tables[0].file} has {', '.join(columns)}"
            )
        _check_images(table, config.image_key)
    starts = np.concatenate([[0], np.cumsum([table.count for table in tables])])

    def read(index: int) -> bytes:
        file = bisect.bisect_right(starts, index) - 1
        return tables[file].image(config.image_key, int(index - starts[file]))

    column = lambda key: [value for table in tables for value in table.values(key)]
    classes, labels, captions, held_out = (), None, None, None
    if key := chosen_key("label_key", config.label_key, "label", columns, where):
        names = _class_names(tables[0].schema, key)
        classes, labels = _labels(column(key), names, f"{key} of {where}")
    if key := chosen_caption_key(config, columns, where):
        captions = [str(value or "") for value in column(key)]
        missing = [str(i) for i, text in enumerate(captions) if not text]
        notes += [f"rows without a caption: {some(missing)}"] * bool(missing)
    if held_out_files:
        held_out = np.arange(starts[-1]) >= starts[len(files) - len(held_out_files)]
    places = [f"{printable(t.file)} row {i}" for t in tables for i in range(t.count)]
    return Records(places, read, classes, labels, captions, held_out, notes + more, files)


def _parts(path: str, files: list[str]) -> tuple[list[str], list[str], list[str]]:
    """The files to train on, those to hold out, and notes.

    `save_to_disk` gives each split a folder; Parquet files are named by their split, as in
    `train-00000-of-00001.parquet` or `data/test-...`.
    """

    def split_of(file: str) -> str:
        *folders, name = os.path.relpath(file, path).split(os.sep)
        for text in (*folders, name.split("-")[0], name.split(".")[0]):
            if text in ("train", *HELD_OUT_NAMES):
                return text
        return ""

    splits = {file: split_of(file) for file in files}
    present = set(splits.values())
    if "train" not in present or "" in present or len(present) < 2:
        return files, [], []
    own = next(name for name in HELD_OUT_NAMES if name in present)
    unused = sorted(present - {"train", own})
    notes = [f"validation is the split {own}"] + [f"unused: {', '.join(unused)}"] * bool(unused)
    of = lambda split: [file for file in files if splits[file] == split]
    return of("train"), of(own), notes


def _check_images(table: Any, key: str):
    """Raises `ConfigError` unless the column holds encoded images."""
    import pyarrow as pa

    names = table.schema.names
    if key not in names:
        raise ConfigError(f"--data.image_key={key}: {table.file} has {', '.join(names)}")
    kind = table.schema.field(key).type
    if pa.types.is_struct(kind):
        kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else kind
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise ConfigError(
            f"--data.image_key={key}: {table.file} holds {kind} there, not encoded images"
        )


def _class_names(schema: Any, key: str) -> list[str] | None:
    """The names that a ClassLabel of the `datasets` library gives the numbers of a column."""
    text = (schema.metadata or {}).get(b"huggingface", b"{}")
    try:
        names = parse_json(text.decode())["info"]["features"][key]["names"]
    except (ValueError, KeyError, TypeError):
        return None
    good = isinstance(names, list) and names and all(isinstance(n, str) for n in names)
    return names if good and len(set(names)) == len(names) else None


def _labels(values: list, names: list[str] | None, where: str):
    if names is None:
        return classes_of(values, where)
    for value in values:
        if not isinstance(value, int) or not 0 <= value < len(names):
            raise ConfigError(
                f"{where} holds {value}, but its {len(names)} classes are numbered from 0: set "
                "--data.label_key= for no labels"
            )
    return tuple(names), np.array(values, np.int32)


def _bytes_of(value: Any) -> bytes:
    data = value.get("bytes") if isinstance(value, dict) else value
    if not data:
        raise Undecodable("it holds no bytes, at most the path of a file")
    if len(data) > MAX_BYTES:
        raise Undecodable(f"it is larger than the {MAX_BYTES:,} bytes allowed here")
    return data


@contextlib.contextmanager
def _reading(file: str) -> Iterator[None]:
    """PyArrow's errors about a damaged file, as one line."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # of many types
        reason = reason_of(error)[:200]
        raise unreadable(file, f"it is a damaged Arrow or Parquet file ({reason})") from None


class _Arrow:
    """A file of record batches, mapped into memory."""

    def __init__(self, file: str):
        import pyarrow as pa

        self.file = file
        open_regular(file).close()  # refuses pipes and the like
        with _reading(file):
            source = pa.memory_map(file)
            try:
                self._table = pa.ipc.open_stream(source).read_all()
            except pa.ArrowInvalid:
                source.seek(0)
                self._table = pa.ipc.open_file(source).read_all()  # of another layout
            self._table.validate(full=True)  # offsets that lead out of the file
        self.schema, self.count = self._table.schema, self._table.num_rows

    def image(self, key: str, row: int) -> bytes:
        return _bytes_of(self._table.column(key)[row].as_py())

    def values(self, key: str) -> list:
        return self._table.column(key).to_pylist()


class _Parquet:
    """A file of row groups, of which the last few that were read are kept."""

    def __init__(self, file: str):
        import pyarrow.parquet as pq

        self.file, self._lock = file, threading.Lock()
        open_regular(file).close()
        with _reading(file):
            self._parquet = pq.ParquetFile(file, memory_map=True)
            meta = self._parquet.metadata
            groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
            self.schema = self._parquet.schema_arrow
        largest = max((group.total_byte_size for group in groups), default=0)
        if largest > MAX_GROUP:
            raise unreadable(file, f"a row group has {largest:,} bytes; {MAX_GROUP:,} are allowed")
        self._starts = np.concatenate([[0], np.cumsum([group.num_rows for group in groups])])
        self.count = int(self._starts[-1])
        self._group = functools.lru_cache(GROUPS_KEPT)(self._read_group)

    def _read_group(self, group: int, key: str) -> Any:
        with _reading(self.file):
            table = self._parquet.read_row_group(group, columns=[key])
            table.validate(full=True)
            return table.column(key)

    def image(self, key: str, row: int) -> bytes:
        group = bisect.bisect_right(self._starts, row) - 1
        with self._lock:
            column = self._group(group, key)
        return _bytes_of(column[int(row - self._starts[group])].as_py())

    def values(self, key: str) -> Sequence:
        with _reading(self.file):
            return self._parquet.read(columns=[key]).column(key).to_pylist()
