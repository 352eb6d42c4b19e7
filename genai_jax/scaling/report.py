"""A study's report: one HTML page that opens offline, and its tables, figures and numbers as files.

An analysis returns `Section`s; `write_report` puts them into a folder.
"""

from __future__ import annotations

import csv
import json
import math
import pathlib
import re
from collections.abc import Sequence

from genai_jax.scaling.report_page import page
from genai_jax.scaling.report_types import Record, Section, Table


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
