"""The data of the fits: final results of runs, and their training curves."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from genai_jax.config import ConfigError
from genai_jax.files import MIB, read_text

MAX_BYTES = 64 * MIB  # of a CSV file
MAX_ROWS = 200_000  # which take about 3 s to read


class Points(NamedTuple):
    """Runs, one per point, as positive float64 arrays [points]."""

    parameters: np.ndarray  # N
    tokens: np.ndarray  # D, seen in training
    flops: np.ndarray  # C, training compute
    loss: np.ndarray  # final L, nats per token

    def where(self, which: np.ndarray) -> Points:
        """The points that a mask [points] or an array of indices selects."""
        return Points(*(a[which] for a in self))


class Curve(NamedTuple):
    """The training curve of one run; tokens, flops and loss are float64 arrays [steps] in order."""

    parameters: float
    tokens: np.ndarray
    flops: np.ndarray
    loss: np.ndarray


def make_points(parameters, tokens, loss, flops=None) -> Points:
    """Points from array-likes [points]; flops are 6 N D if not given.

    Raises:
      ConfigError: lengths that differ, or a value that is not a positive number.
    """
    parameters, tokens, loss = (np.asarray(a, np.float64) for a in (parameters, tokens, loss))
    flops = 6 * parameters * tokens if flops is None else np.asarray(flops, np.float64)
    points = Points(parameters, tokens, flops, loss)
    if any(a.ndim != 1 or len(a) != len(loss) for a in points):
        shapes = ", ".join(f"{n} {a.shape}" for n, a in zip(Points._fields, points, strict=True))
        raise ConfigError(f"points must be 1-D arrays of the same length, not {shapes}")
    for name, values in zip(Points._fields, points, strict=True):
        bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
        if len(bad):
            raise ConfigError(
                f"point {bad[0]}: {name} is {values[bad[0]]:g}; it must be a positive number"
            )
    return points


def check_enough(count: int, coefficients: int, what: str):
    """Raises `ConfigError` if there are fewer points than coefficients."""
    if count < coefficients:
        raise ConfigError(
            f"{what} needs at least as many points as its {coefficients} coefficients, not {count}"
        )


def check_spread(points: Points):
    """Raises `ConfigError` if sizes or tokens do not vary enough for a law of both.

    It takes three sizes, not two, to separate a term A / N^alpha from a constant.
    """
    for name in ("parameters", "tokens"):
        count = len(np.unique(getattr(points, name)))
        if count < 3:
            raise ConfigError(
                f"a law of parameters and tokens needs at least 3 different {name}, but there are "
                f"{count}"
            )


class Columns(NamedTuple):
    """The column names of a CSV file."""

    parameters: str = "parameters"
    tokens: str = "tokens"
    loss: str = "loss"
    flops: str | None = None  # 6 N D if None
    run: str | None = None  # if set, the rows of a run are its curve, and the last its result


class Data(NamedTuple):
    """The runs of a table."""

    points: Points
    held_out: np.ndarray  # [points] bool
    curves: list[Curve] | None  # curves of the runs that are not held out


class TableText(NamedTuple):
    """A table of runs as text."""

    name: str  # of the table, in messages
    places: list[str]  # of the rows, in messages
    rows: list[dict]  # column name -> text


def read_csv(path: str, columns: Columns, held_out: str = "") -> Data:
    """Reads runs from a CSV file with a header line; the rest is as in `read_table`."""
    return _read(_csv_text(path), columns, held_out)


def read_table(table: Any, columns: Columns, held_out: str = "") -> Data:
    """Reads runs from a table in Python.

    Args:
      table: a list of dictionaries, one per row, or a mapping of column names to values, such as a
        data frame.
      columns: the names of its columns.
      held_out: a condition on a column, such as "flops>1e19", "tokens>=2e9" or "large=1"; "flops"
        works even if it is not a column. If empty, nothing is held out.

    Raises:
      ConfigError: a missing column, or a value that is not a positive number; the message gives the
        row, from 0, or the line in the file, where the header is line 1.
    """
    return _read(_table_text(table), columns, held_out)


def _read(table: TableText, columns: Columns, held_out: str) -> Data:
    numbers = {
        field: _positive_column(table, name)
        for field, name in columns._asdict().items()
        if name and field != "run"
    }
    points = make_points(**numbers)
    hidden = _condition(table, held_out, points)
    if not columns.run:
        return Data(points, hidden, None)
    runs = np.array(_column(table, columns.run))
    members = [np.flatnonzero(runs == name) for name in dict.fromkeys(runs.tolist())]
    ends = np.array([m[-1] for m in members])
    curves = [
        Curve(points.parameters[m[-1]], points.tokens[m], points.flops[m], points.loss[m])
        for m in members
    ]
    hidden = hidden[ends]
    if held_out:
        _check_some(hidden, held_out, "runs (judged by their last rows)")
    seen = [curve for curve, is_hidden in zip(curves, hidden, strict=True) if not is_hidden]
    return Data(points.where(ends), hidden, seen)


def _table_text(table: Any) -> TableText:
    """The text of a table in Python."""
    if hasattr(table, "keys"):
        columns = {str(name): list(table[name]) for name in table.keys()}  # noqa: SIM118, frames
        if len({len(values) for values in columns.values()}) > 1:
            lengths = ", ".join(f"{name} {len(values)}" for name, values in columns.items())
            raise ConfigError(f"the columns of the table have different lengths: {lengths}")
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    elif isinstance(table, Sequence) and all(isinstance(row, Mapping) for row in table):
        rows = [{str(name): value for name, value in row.items()} for row in table]
    else:
        raise ConfigError(
            "the table is a path of a CSV file, a list of dictionaries, or a mapping of column "
            f"names to values, not a {type(table).__name__}"
        )
    if not rows:
        raise ConfigError("the table has no rows")
    texts = [{name: "" if x is None else str(x) for name, x in row.items()} for row in rows]
    return TableText("the table", [f"row {i} of the table" for i in range(len(rows))], texts)


def _csv_text(path: str) -> TableText:
    text = read_text(path, f"--csv={path}", limit=MAX_BYTES)
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
    numbered: list[tuple[int, dict]] = []
    try:
        for row in reader:
            numbered.append((reader.line_num, row))
            if len(numbered) > MAX_ROWS:
                raise ConfigError(
                    f"--csv={path} has more than {MAX_ROWS:,} rows: leave out some rows of the "
                    "training curves"
                )
    except csv.Error as error:
        raise ConfigError(f"cannot read --csv={path}: {error}") from None
    names = reader.fieldnames or ()
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--csv={path} has more than one column {name!r}")
    if not numbered:
        raise ConfigError(f"--csv={path} has no rows below its header")
    lines, rows = zip(*numbered, strict=True)
    return TableText(f"--csv={path}", [f"{path} line {line}" for line in lines], list(rows))


def _column(table: TableText, name: str) -> list[str]:
    known = [n for n in table.rows[0] if n]
    if name not in known:
        raise ConfigError(
            f"{table.name} has no column {name!r}; its columns are {', '.join(known)}"
        )
    return [(row.get(name) or "").strip() for row in table.rows]


def _numeric_column(table: TableText, name: str) -> np.ndarray:
    """[points]; raises `ConfigError` for a value that is not a number."""
    values = []
    for place, text in zip(table.places, _column(table, name), strict=True):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if math.isnan(value):
            raise ConfigError(f"{place}: {name} is {text!r}, not a number")
        values.append(value)
    return np.array(values)


def _positive_column(table: TableText, name: str) -> np.ndarray:
    values = _numeric_column(table, name)
    bad = np.flatnonzero((values <= 0) | np.isinf(values))
    if len(bad):
        place, value = table.places[bad[0]], values[bad[0]]
        raise ConfigError(f"{place}: {name} is {value:g}; it must be positive")
    return values


COMPARISONS = {
    ">": np.greater, ">=": np.greater_equal, "<": np.less, "<=": np.less_equal, "=": np.equal,
}  # fmt: skip


def _condition(table: TableText, text: str, points: Points) -> np.ndarray:
    """[points] bool."""
    if not text:
        return np.zeros(len(table.rows), bool)
    match = re.fullmatch(r"\s*([^<>=]+?)\s*(>=|<=|>|<|=)\s*(\S+)\s*", text)
    try:
        name, comparison, bound = match.group(1), match.group(2), float(match.group(3))
    except (AttributeError, ValueError):
        raise ConfigError(
            f"--held_out={text}: write one column, one of > >= < <= =, and a number, as flops>1e19"
        ) from None
    if name == "flops" and name not in table.rows[0]:
        values = points.flops
    else:
        values = _numeric_column(table, name)
    hidden = COMPARISONS[comparison](values, bound)
    _check_some(hidden, text, "rows")
    return hidden


def _check_some(hidden: np.ndarray, text: str, what: str):
    """Raises `ConfigError` if all or none are held out."""
    if hidden.all() or not hidden.any():
        raise ConfigError(
            f"--held_out={text} matches {hidden.sum()} of {len(hidden)} {what}; it must match "
            "some but not all"
        )
