"""What an analysis found, for Python: the numbers, tables and figures of its report."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import TYPE_CHECKING, Any

from genai_jax.scaling.report_page import table_html
from genai_jax.scaling.report_text import text_of
from genai_jax.scaling.report_types import Section, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Rows(list[dict[str, Any]]):
    """A table: a dictionary per row, column -> value. Notebooks show it as a table."""

    def _repr_html_(self) -> str:
        columns = tuple(dict.fromkeys(name for row in self for name in row))
        cells = [tuple(row.get(name) for name in columns) for row in self]
        return table_html(Table("", columns, cells))


def _plain(cell: Any) -> Any:
    """A cell without the types of numpy."""
    return cell.item() if hasattr(cell, "item") else cell


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """The sections of a report. `print` shows the text that the command prints.

    Attributes:
      sections: text, tables, figures and numbers.
      page: the HTML page, next to the CSV and PNG files; None if none was written.
    """

    sections: list[Section]
    page: pathlib.Path | None = None

    @property
    def numbers(self) -> dict[str, float]:
        """All numbers by name, as in ``results.json``."""
        numbers = [item for section in self.sections for item in section.numbers.items()]
        return {name: _plain(value) for name, value in numbers}

    @property
    def tables(self) -> dict[str, Rows]:
        """Name -> rows; the names are those of the CSV files."""
        tables = [table for section in self.sections for table in section.tables]
        return {
            table.name: Rows(
                dict(zip(table.columns, map(_plain, row), strict=True)) for row in table.rows
            )
            for table in tables
        }

    @property
    def figures(self) -> dict[str, Figure]:
        """Name -> Matplotlib figure; the names are those of the PNG files."""
        return {
            name: figure for section in self.sections for name, figure in section.figures.items()
        }

    def __str__(self) -> str:
        in_words = [s for s in self.sections if s.tables or not s.figures]
        return "\n".join(text_of(in_words)).lstrip()

    def __repr__(self) -> str:
        parts = {"tables": self.tables, "figures": self.figures}
        named = [f"{kind} {', '.join(names)}" for kind, names in parts.items() if names]
        return f"<{'; '.join([type(self).__name__, f'{len(self.numbers)} numbers', *named])}>"
