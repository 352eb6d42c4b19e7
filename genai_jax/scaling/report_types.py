"""The parts of a report: an analysis returns sections of text, tables, figures and numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, NotRequired, TypedDict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Cell = str | float | int | None  # None is an empty cell


class Table(NamedTuple):
    """A table of the report.

    Attributes:
      name: file name of its CSV file, without ".csv".
      columns: column headers, with units.
      rows: tuples of numbers or text, one cell per column.
    """

    name: str
    columns: tuple[str, ...]
    rows: list[tuple[Cell, ...]]


class Section(NamedTuple):
    """A section of the report.

    Attributes:
      title: its heading.
      paragraphs: plain text.
      tables: shown on the page and written as CSV files.
      figures: file name without ".png" -> `matplotlib.figure.Figure`, created without pyplot,
        which would keep it alive.
      numbers: flat name -> value, as written to ``results.json`` and checked against
        ``expected.json``.
    """

    title: str
    paragraphs: list[str] = []  # noqa: RUF012, never modified
    tables: list[Table] = []  # noqa: RUF012
    figures: dict[str, Figure] = {}  # noqa: RUF012
    numbers: dict[str, float] = {}  # noqa: RUF012


class Record(TypedDict):
    """Everything another lab needs to reproduce the report.

    Attributes:
      question: the question of the study in plain text, shown under the title.
      warnings: lines that the reader should see first.
      commands: shell commands that reproduce the report.
      environment: versions, devices, data; may be nested.
      flags: run -> text of a flagfile that reproduces it.
    """

    question: NotRequired[str]
    warnings: NotRequired[Sequence[str]]
    commands: NotRequired[Sequence[str]]
    environment: NotRequired[Mapping]
    flags: NotRequired[Mapping[str, str]]
