"""The parts of a report: sections with text, tables, figures and numbers."""

from __future__ import annotations

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
