"""The sections of a report as plain text, for a terminal."""

from collections.abc import Sequence

from genai_jax.scaling.report_types import Cell, Section


def text_of(sections: Sequence[Section]) -> list[str]:
    """Lines with the titles, paragraphs, and tables; numbers have four digits."""
    lines = []
    for section in sections:
        lines += ["", section.title, *section.paragraphs]
        for table in section.tables:
            cells = [table.columns, *([_shown(value) for value in row] for row in table.rows)]
            widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
            lines += ["  " + "  ".join(map(str.rjust, row, widths)) for row in cells]
    return lines


def _shown(value: Cell) -> str:
    if value is None or value != value:  # NaN: an interval without resamples
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
