"""A study's report: one HTML page that opens offline, and its tables, figures and numbers as files.

An analysis returns `Section`s; `write_report` puts them into a folder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

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
