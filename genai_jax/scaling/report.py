"""A study's report: one HTML page that opens offline, and its tables, figures and numbers as files.

An analysis returns `Section`s; `write_report` puts them into a folder.
"""

from __future__ import annotations

import csv
import json
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, NotRequired, TypedDict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Cell = str | float | int | None  # None is an empty cell


class Table(NamedTuple):
    """A table of the report.

    Attributes:
      name: the file name of its CSV, without ".csv".
      columns: headings, with units.
      rows: a tuple of cells each, numbers or text, as many as there are columns.
    """

    name: str
    columns: tuple[str, ...]
    rows: list[tuple[Cell, ...]]


class Section(NamedTuple):
    """A part of the report, under a heading of its own.

    Attributes:
      title: its heading.
      paragraphs: plain text.
      tables: shown in the page and written as CSV.
      figures: file name without ".png" -> `matplotlib.figure.Figure`; not made by pyplot, which
        would keep it.
      numbers: flat name -> value: what ``results.json`` holds and ``expected.json`` is checked
        against.
    """

    title: str
    paragraphs: list[str] = []  # noqa: RUF012, nobody appends to it
    tables: list[Table] = []  # noqa: RUF012
    figures: dict[str, Figure] = {}  # noqa: RUF012
    numbers: dict[str, float] = {}  # noqa: RUF012


class Record(TypedDict):
    """How the report came about: what another lab needs to make it again.

    Attributes:
      question: what was asked, plain text, shown under the title.
      warnings: what the reader should know before anything else, a line each.
      commands: lines of a shell that make the report.
      environment: versions, devices, data; may be nested.
      flags: run -> the text of a flagfile that reproduces it.
    """

    question: NotRequired[str]
    warnings: NotRequired[Sequence[str]]
    commands: NotRequired[Sequence[str]]
    environment: NotRequired[Mapping]
    flags: NotRequired[Mapping[str, str]]


def write_report(
    folder: str | pathlib.Path, title: str, sections: Sequence[Section], *, record: Record
) -> None:
    """Writes a report into `folder`, made if need be; files of the same names are replaced.

    ``index.html`` holds everything, figures included, and needs neither network nor script.
    Beside it: ``<table>.csv``, ``<figure>.png``, and ``results.json``, an object with ``title``,
    ``numbers`` (those of all sections, null where one is not finite) and the ``record``.

    Raises:
      ValueError: two sections, tables, figures or numbers of the same name; a row of the wrong
        length.
    """
    from genai_jax.scaling.report_page import page

    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _by_name("section", [(s.title, s) for s in sections])
    tables = _by_name("table", [(table.name, table) for s in sections for table in s.tables])
    figures = _by_name("figure", [item for s in sections for item in s.figures.items()])
    numbers = _by_name("number", [item for s in sections for item in s.numbers.items()])
    for table in tables.values():
        _write_csv(folder / f"{table.name}.csv", table)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=150)
    finite = {name: float(v) if math.isfinite(v) else None for name, v in numbers.items()}
    results = {"title": title, "numbers": finite, "record": record}
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "index.html").write_text(page(title, sections, record), encoding="utf-8")


def read_numbers(path: pathlib.Path) -> dict[str, float]:
    """The numbers of a ``results.json``, nan where one was not finite."""
    numbers = json.loads(path.read_text())["numbers"]
    return {name: math.nan if value is None else value for name, value in numbers.items()}


def file_name(text: str) -> str:
    """`text` with what is not good in a file's name, such as the slash of ``eval/loss``, as "_"."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text)


def _by_name(kind: str, items: Sequence[tuple]) -> dict:
    """The items as a dictionary; raises `ValueError` if two have one name."""
    found: dict = {}
    for name, value in items:
        if name in found:
            raise ValueError(f"two {kind}s of the report are named {name!r}")
        found[name] = value
    return found


def _write_csv(path: pathlib.Path, table: Table):
    wrong = [row for row in table.rows if len(row) != len(table.columns)]
    if wrong:
        raise ValueError(f"table {table.name!r} has {len(table.columns)} columns, not {wrong[0]}")
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(table.columns)
        writer.writerows(table.rows)
