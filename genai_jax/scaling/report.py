"""Writes a report: one self-contained HTML page, and its tables, figures and numbers as files."""

from __future__ import annotations

import csv
import json
import math
import pathlib
import re
from collections.abc import Sequence

from genai_jax.files import read_object, write_text
from genai_jax.scaling.report_page import page
from genai_jax.scaling.report_types import Record, Section, Table


def write_report(
    folder: str | pathlib.Path, title: str, sections: Sequence[Section], *, record: Record
) -> None:
    """Writes a report into `folder`, which is created if needed; existing files are replaced.

    ``index.html`` holds everything, including the figures, and needs neither network nor scripts.
    Next to it are ``<table>.csv``, ``<figure>.png``, and ``results.json``, an object with
    ``title``, ``numbers`` (those of all sections, null where one is not finite) and the ``record``.

    Raises:
      ValueError: two sections, tables, figures or numbers have the same name, or a row has the
        wrong length.
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
        show_dollars(figure)
        figure.savefig(folder / f"{name}.png", dpi=150)
    finite = {name: float(v) if math.isfinite(v) else None for name, v in numbers.items()}
    results = {"title": title, "numbers": finite, "record": record}
    write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(folder / "index.html", page(title, sections, record))


def show_dollars(figure) -> None:
    """Shows every text of a Matplotlib figure as it is: names of runs and metrics are no formulas.

    The tick labels that Matplotlib writes itself, such as powers of ten, stay formulas.
    """
    from matplotlib.text import Text
    from matplotlib.ticker import FixedFormatter, FuncFormatter

    own: set[int] = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if not isinstance(axis.get_major_formatter(), FixedFormatter | FuncFormatter):
                own |= {id(label) for label in axis.get_majorticklabels()}
            own |= {id(label) for label in axis.get_minorticklabels()}
    for text in figure.findobj(Text):
        if id(text) not in own:
            text.set_parse_math(False)


def read_numbers(path: pathlib.Path) -> dict[str, float]:
    """The numbers of a ``results.json``, NaN where one was not finite."""
    numbers = read_object(path)["numbers"]
    return {name: math.nan if value is None else value for name, value in numbers.items()}


def file_name(text: str) -> str:
    """`text` as a file name: characters such as the slash of ``eval/loss`` become "_"."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text)


def _by_name(kind: str, items: Sequence[tuple]) -> dict:
    """The items as a dictionary; raises `ValueError` if two have the same name."""
    by_name: dict = {}
    for name, value in items:
        if name in by_name:
            raise ValueError(f"two {kind}s of the report are named {name!r}")
        by_name[name] = value
    return by_name


def _write_csv(path: pathlib.Path, table: Table):
    wrong = [row for row in table.rows if len(row) != len(table.columns)]
    if wrong:
        raise ValueError(
            f"table {table.name!r} has {len(table.columns)} columns, but a row is {wrong[0]}"
        )
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(table.columns)
        writer.writerows(table.rows)
