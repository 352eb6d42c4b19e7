"""The data of the fits: final results of runs, and their training curves."""

from __future__ import annotations

import csv
import io
import math
import re
from typing import NamedTuple

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
    """The content of a CSV file."""

    points: Points
    held_out: np.ndarray  # [points] bool
    curves: list[Curve] | None  # curves of the runs that are not held out


def read_csv(path: str, columns: Columns, held_out: str = "") -> Data:
    """Reads runs from a CSV file with a header line.

    Args:
      path: the file.
      columns: the names of its columns.
      held_out: a condition on a column, such as "flops>1e19", "tokens>=2e9" or "large=1"; "flops"
        works even if it is not a column. If empty, nothing is held out.

    Raises:
      ConfigError: a missing column, or a value that is not a positive number; the message gives the
        line in the file, where the header is line 1.
    """
    lines, rows = _read_rows(path)
    numbers = {
        field: _positive_column(path, lines, rows, name)
        for field, name in columns._asdict().items()
        if name and field != "run"
    }
    points = make_points(**numbers)
    hidden = _condition(path, lines, rows, held_out, points)
    if not columns.run:
        return Data(points, hidden, None)
    runs = np.array(_column(path, rows, columns.run))
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


def _read_rows(path: str) -> tuple[list[int], list[dict]]:
    """(line number of each row, column name -> text of each row)."""
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
    return list(lines), list(rows)


def _column(path: str, rows: list[dict], name: str) -> list[str]:
    known = [n for n in rows[0] if n]
    if name not in known:
        raise ConfigError(
            f"--csv={path} has no column {name!r}; its columns are {', '.join(known)}"
        )
    return [(row[name] or "").strip() for row in rows]


def _numeric_column(path: str, lines: list[int], rows: list[dict], name: str) -> np.ndarray:
    """[points]; raises `ConfigError` for a value that is not a number."""
    values = []
    for line, text in zip(lines, _column(path, rows, name), strict=True):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if math.isnan(value):
            raise ConfigError(f"{path} line {line}: {name} is {text!r}, not a number")
        values.append(value)
    return np.array(values)


def _positive_column(path: str, lines: list[int], rows: list[dict], name: str) -> np.ndarray:
    values = _numeric_column(path, lines, rows, name)
    bad = np.flatnonzero((values <= 0) | np.isinf(values))
    if len(bad):
        line, value = lines[bad[0]], values[bad[0]]
        raise ConfigError(f"{path} line {line}: {name} is {value:g}; it must be positive")
    return values


COMPARISONS = {
    ">": np.greater, ">=": np.greater_equal, "<": np.less, "<=": np.less_equal, "=": np.equal,
}  # fmt: skip


def _condition(path, lines, rows, text: str, points: Points) -> np.ndarray:
    """[points] bool."""
    if not text:
        return np.zeros(len(rows), bool)
    match = re.fullmatch(r"\s*([^<>=]+?)\s*(>=|<=|>|<|=)\s*(\S+)\s*", text)
    try:
        name, comparison, bound = match.group(1), match.group(2), float(match.group(3))
    except (AttributeError, ValueError):
        raise ConfigError(
            f"--held_out={text}: write one column, one of > >= < <= =, and a number, as flops>1e19"
        ) from None
    if name == "flops" and name not in rows[0]:
        values = points.flops
    else:
        values = _numeric_column(path, lines, rows, name)
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
