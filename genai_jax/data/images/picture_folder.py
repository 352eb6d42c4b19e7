"""``images:PATH``: a folder of picture files, with classes and captions."""

import collections
import csv
import io
import os
from typing import Any

import numpy as np

from genai_jax.data.folders import list_files
from genai_jax.data.images.records import (
    HELD_OUT_NAMES,
    MAX_BYTES,
    Records,
    chosen_caption_key,
    chosen_key,
    classes_of,
    some,
)
from genai_jax.errors import ConfigError, MissingFile, printable
from genai_jax.files import parse_json, read_bytes, read_text, unreadable

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
TABLES = ("metadata.csv", "metadata.jsonl", "captions.csv", "captions.jsonl")
FILE_NAME = "file_name"  # the column that says which picture a row is about
MAX_TABLE = 1 << 30  # bytes


def read_folder(config: Any) -> Records:
    """The pictures of a folder, sorted by relative path.

    The first folder below PATH that a picture lies in is its class. If all of these are named
    train, validation, and the like, they are splits, and the classes are the folders below them. A
    table (one of `TABLES`, in any folder) holds a row for each picture: `file_name`, relative to
    the table, and columns that ``--data.label_key`` and ``--data.caption_key`` name.

    Raises:
      ConfigError: no folder, no pictures, a table that cannot be read, or unclear classes.
    """
    path = config.dataset.removeprefix("images:")
    if not os.path.isdir(path):
        kind = "it is not a folder" if os.path.exists(path) else "no such folder"
        raise MissingFile(f"--data.dataset=images:{path}: {kind}", "data.dataset")
    files, skipped = list_files(path)
    names = [os.path.relpath(file, path) for file in files]
    tables = [name for name in names if os.path.basename(name) in TABLES]
    pictures = [name for name in names if os.path.splitext(name)[1].lower() in SUFFIXES]
    skipped["with other suffixes"] = len(names) - len(pictures) - len(tables)
    shown = [f"{count:,} {kind}" for kind, count in skipped.items() if count]
    notes = [f"skipped files: {', '.join(shown)}"] if shown else []
    rows = _Rows(path, tables, set(pictures)) if tables else None
    held_out = None
    if pictures and (own := _own_splits(pictures)):
        held_out_name, unused = own
        if unused:
            notes.append(f"unused: {', '.join(unused)}")
        pictures = [name for name in pictures if _first(name) in ("train", held_out_name)]
        held_out = np.array([_first(name) == held_out_name for name in pictures])
        notes.append(f"validation is the folder {held_out_name}")
    # A folder train alone is the data set without what its owner holds out.
    levels = int(held_out is not None or {_first(name) for name in pictures} == {"train"})
    classes, labels = _classes(config, pictures, levels, rows)
    captions = None
    if rows:
        key = chosen_caption_key(config, rows.columns, rows.where)
        captions = [str(rows.of(name).get(key) or "") for name in pictures] if key else None
        missing = [name for name in pictures if captions and not rows.of(name).get(key)]
        notes += rows.notes + [f"without a caption: {some(missing)}"] * bool(missing)
    elif config.caption_key:
        raise ConfigError(
            f"--data.caption_key={config.caption_key}: images:{path} has no {TABLES[0]} or "
            f"{TABLES[1]} with captions"
        )
    places = [os.path.join(path, name) for name in pictures]
    return Records(
        [printable(place) for place in places],
        lambda index: read_bytes(places[index], limit=MAX_BYTES),
        classes, labels, captions, held_out, notes,
        places + [os.path.join(path, table) for table in tables],
    )  # fmt: skip


def files_of(path: str, suffixes: tuple[str, ...], kind: str) -> tuple[list[str], list[str]]:
    """The files with these suffixes below `path`, or `path` itself; notes on what is skipped.

    Raises:
      ConfigError: nothing there, or nothing with such a suffix.
    """
    if os.path.isfile(path):
        return [path], []
    if not os.path.isdir(path):
        why = "neither a file nor a folder" if os.path.exists(path) else "no such file or folder"
        raise MissingFile(f"--data.dataset={kind}:{path}: {why}", "data.dataset")
    there, skipped = list_files(path)
    files = [file for file in there if file.lower().endswith(suffixes)]
    skipped["with other suffixes"] = len(there) - len(files)
    if not files:
        raise ConfigError(f"{kind}:{path} has no {' or '.join(suffixes)} files")
    shown = [f"{count:,} {name}" for name, count in skipped.items() if count]
    return files, [f"skipped files: {', '.join(shown)}"] if shown else []


def _first(name: str) -> str:
    return name.split(os.sep, 1)[0]


def _own_splits(pictures: list[str]) -> tuple[str, list[str]] | None:
    """The top folder that is held out, and those not used, if the top folders are splits."""
    tops = {_first(name) if os.sep in name else "" for name in pictures}
    if "train" not in tops or not tops <= {"train", *HELD_OUT_NAMES} or len(tops) < 2:
        return None
    name = next(name for name in HELD_OUT_NAMES if name in tops)
    return name, sorted(tops - {"train", name})


def _classes(
    config: Any, pictures: list[str], levels: int, rows: "_Rows | None"
) -> tuple[tuple[str, ...], np.ndarray | None]:
    """The classes by a column of the tables, or else by the folders below `levels` folders."""
    if not config.label_key:
        return (), None
    columns = rows.columns if rows else ()
    where = rows.where if rows else f"{config.dataset}, without a table of its pictures,"
    key = chosen_key("label_key", config.label_key, "label", columns, where)
    if key:
        return classes_of([rows.of(name).get(key, "") for name in pictures], f"{key} in {where}")
    parts = [name.split(os.sep)[levels:-1] for name in pictures]
    outside = [name for name, folders in zip(pictures, parts, strict=True) if not folders]
    if len(outside) == len(pictures):
        return (), None
    if outside:
        raise ConfigError(
            f"{config.dataset} has folders of classes, and pictures outside of them: "
            f"{printable(some(outside))}; move these into a folder, or set --data.label_key= for "
            "no labels"
        )
    return classes_of([folders[0] for folders in parts], f"a folder of {config.dataset}")


class _Rows:
    """The rows of all tables of a folder, by the picture that they are about."""

    def __init__(self, path: str, tables: list[str], pictures: set[str]):
        self._rows: dict[str, dict[str, Any]] = {}
        self.columns: list[str] = []
        self.where = os.path.join(path, tables[0]) + (" and others" if len(tables) > 1 else "")
        self.notes: list[str] = []
        missing, repeated = [], []
        for table in tables:
            read = _read_csv if table.endswith(".csv") else _read_json_lines
            for row in read(os.path.join(path, table)):
                name = row.pop(FILE_NAME, None)
                if not isinstance(name, str):
                    raise unreadable(
                        os.path.join(path, table), f"a row has no {FILE_NAME}, the picture's path"
                    )
                name = os.path.normpath(os.path.join(os.path.dirname(table), name))
                kind = missing if name not in pictures else repeated if name in self._rows else None
                if kind is not None:
                    kind.append(name)
                    continue
                self._rows[name] = row
                self.columns += [column for column in row if column not in self.columns]
        if missing and not self._rows:
            raise ConfigError(
                f"no row of {self.where} names a picture: {printable(some(missing))} are not there"
            )
        for kind, names in (("missing", missing), ("listed again, which is ignored", repeated)):
            if names:
                self.notes.append(f"{kind}: {printable(some(names))}")

    def of(self, name: str) -> dict[str, Any]:
        return self._rows.get(name, {})


def _read_csv(path: str) -> list[dict[str, Any]]:
    text = read_text(path, limit=MAX_TABLE)
    try:
        rows = list(csv.reader(io.StringIO(text), strict=True))
    except csv.Error as error:
        raise unreadable(path, f"it is not valid CSV: {error}") from None
    if not rows or FILE_NAME not in rows[0]:
        raise unreadable(path, f"its first line has no column {FILE_NAME}, the picture's path")
    names = rows[0]
    repeated = [name for name, count in collections.Counter(names).items() if count > 1]
    if repeated:
        raise unreadable(path, f"it has the column {repeated[0]!r} twice")
    for number, row in enumerate(rows[1:], 2):
        if row and len(row) != len(names):
            raise unreadable(path, f"row {number} has {len(row)} values for {len(names)} columns")
    return [dict(zip(names, row, strict=True)) for row in rows[1:] if row]


def _read_json_lines(path: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(read_text(path, limit=MAX_TABLE).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise unreadable(path, f"line {number}: {error}") from None
        if not isinstance(row, dict):
            raise unreadable(path, f"line {number} is not a JSON object")
        rows.append(row)
    return rows
