"""``metrics.jsonl``: one JSON object per logged step, named by its key ``step``."""

import contextlib
import itertools
import json
import math
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from genai_jax.config import ConfigError
from genai_jax.files import open_regular, unreadable
from genai_jax.training.tensorboard import TensorBoard

BLOCK = 1 << 16  # bytes read at a time from the end of a file
LARGEST = 1 << 34  # bytes of a file that is read as a whole
LONGEST = 1 << 20  # bytes of a line; a longer one is no row


class MetricsLog:
    """Appends one JSON object per logged step, and mirrors it to TensorBoard and other boards.

    Rows after `start_step` were written between the last checkpoint and a crash. They are dropped,
    since the resumed run writes them again.

    A row that cannot be written (a full disk) raises nothing. It and all later ones are kept in
    `unwritten`, for the checkpoint to hold, and `check` raises. A number that is not finite is left
    out of its row, with one warning for each name.

    Raises:
      ConfigError: the file is not a metrics file.
    """

    def __init__(self, workdir: pathlib.Path, start_step: int, more_boards: Sequence[Any] = ()):
        self.path = workdir / "metrics.jsonl"
        self.unwritten: list[dict] = []
        self._error: OSError | None = None
        self._left_out: set[str] = set()
        if start_step and not os.path.lexists(self.path):
            print(
                f"warning: {self.path} is missing, and with it the rows up to step {start_step}",
                file=sys.stderr,
            )
        self._file, self._size = _open_after(self.path, start_step)
        self._boards = TensorBoard(workdir / "tensorboard", start_step + 1), *more_boards

    def write(self, *rows: dict) -> bool:
        """Writes {"step": ..., name: number, ...}, each; returns whether they are in the file."""
        for row in map(self._finite, rows):
            if self._error is None:
                try:
                    self._append(row)
                except OSError as error:
                    self._error = error
            if self._error is None:
                for board in self._boards:
                    board.write(row)
            else:
                self.unwritten.append(row)
        return self._error is None

    def show(self, step: int, files: Mapping[str, pathlib.Path]):
        """Shows pictures and texts on the boards, each under its name."""
        for board in self._boards:
            board.show(step, files)

    def check(self, kept: str = "nothing is saved"):
        """Raises `ConfigError`, which says what is `kept`, if a row could not be written."""
        if self._error is not None:
            problem = self._error.strerror or self._error
            raise ConfigError(f"cannot write to {self.path}: {problem}; {kept}")

    def close(self, failed: bool = False):
        """Closes the file and the boards, which show whether the run `failed`.

        It did also if a row could not be written.
        """
        self._file.close()
        for board in self._boards:
            board.close(failed or self._error is not None)

    def _finite(self, row: dict) -> dict:
        """The row without numbers that are not finite, which JSON does not have."""
        bad = {name: value for name, value in row.items() if not math.isfinite(value)}
        for name in bad.keys() - self._left_out:
            print(
                f"warning: {name} is {bad[name]} at step {row['step']}; rows leave it out where it "
                "is not finite",
                file=sys.stderr,
            )
        self._left_out |= bad.keys()
        return {name: value for name, value in row.items() if name not in bad}

    def _append(self, row: dict):
        if not self._in_place():
            print(
                f"warning: {self.path} was deleted or replaced during the run; rows before step "
                f"{row['step']} may be missing from it",
                file=sys.stderr,
            )
            self._file.close()
            self._file, self._size = _open_after(self.path, row["step"] - 1)
        line = json.dumps(row).encode() + b"\n"
        try:
            _write_all(self._file, line)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), self._size)  # no part of a row is left
            raise
        self._size += len(line)

    def _in_place(self) -> bool:
        """Whether the file at the path is still the one that is open, with all its rows."""
        try:
            there = os.stat(self.path)
        except FileNotFoundError:
            return False
        return os.path.samestat(there, os.fstat(self._file.fileno())) and (
            there.st_size >= self._size
        )


def _open_after(path: pathlib.Path, step: int):
    """The file for appending, without its rows after `step`; and its size."""
    _is_file(path)
    file = open(path, "a+b", buffering=0)  # noqa: SIM115, lives as long as the run
    try:
        end, foreign = _end_of(file, path, step)
        if foreign:
            print(
                f"warning: dropped {foreign} line(s) that are not metrics from {path}",
                file=sys.stderr,
            )
        file.truncate(end)
        if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
            _write_all(file, b"\n")
            end += 1
    except BaseException:
        file.close()
        raise
    return file, end


def _end_of(file, path: pathlib.Path, step: int) -> tuple[int, int]:
    """Where the last row at or before `step` ends, and the number of lines after it without a step.

    Reads backwards from the end of the file, so that a long file costs no more than a short one.
    """
    size, foreign = os.fstat(file.fileno()).st_size, 0
    for end, line in _backwards(file, path, size) if step else ():
        row = parse_row(line)
        if row and row["step"] <= step:
            return min(end + 1, size), foreign
        foreign += row is None and end < size  # a crash may have cut the last line short
    return 0, foreign


def _backwards(file, path: pathlib.Path, size: int) -> Iterator[tuple[int, bytes]]:
    """(where it ends, line without its newline) from what follows the last newline to the first."""
    rest, end = b"", size
    for start in range((size - 1) // BLOCK * BLOCK, -1, -BLOCK):
        first, *lines = (os.pread(file.fileno(), BLOCK, start) + rest).split(b"\n")
        for line in reversed(lines):
            yield end, line
            end -= len(line) + 1
        rest = first
        if len(rest) > LONGEST:
            raise ConfigError(
                f"{path} has a line of more than {LONGEST} bytes, which cannot be a row"
            )
    yield end, rest


def _is_file(path: pathlib.Path) -> bool:
    """Whether there is a file; raises `ConfigError` for what could be read without end."""
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is not a regular file")
    return path.exists()


def _write_all(file, data: bytes):
    while data:  # a disk that is about to be full takes a part
        data = data[file.write(data) :]


def parse_row(line: bytes) -> dict | None:
    """The row in a line; None if the line holds anything else."""
    if len(line) > LONGEST:
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not 0 <= _integer(row.get("step")) < 1 << 53:
        return None
    return row if all(_is_number(value) for value in row.values()) else None


def _integer(value) -> int:
    return value if type(value) is int else -1


def _is_number(value) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < 1 << 63)


def read_metrics(path: pathlib.Path) -> list[dict]:
    """All rows of a metrics file; empty if there is none. See `read_lines`."""
    return list(parse_rows(read_lines(path), path))


def read_lines(path: pathlib.Path) -> Iterator[bytes]:
    """The lines of a metrics file, without a last one that a crash cut short.

    Raises:
      ConfigError: it is not a file, or cannot be read.
    """
    if not _is_file(path):
        return
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > LARGEST:
            raise unreadable(path, f"it is larger than {LARGEST:,} bytes")
        for line in iter(lambda: file.readline(LONGEST), b""):
            if line.endswith(b"\n") or parse_row(line):
                yield line


def parse_rows(lines: Iterable[bytes], path: pathlib.Path) -> Iterator[dict]:
    """The rows in lines of the file `path`; warns of the number of lines that are none."""
    foreign = 0
    for row in map(parse_row, lines):
        if row is None:
            foreign += 1
        else:
            yield row
    if foreign:
        print(f"warning: skipped {foreign} line(s) of {path} that are not metrics", file=sys.stderr)


def thinned(lines: Iterable[bytes], most: int) -> list[bytes]:
    """At most about 2 * `most` of each kind of line, at even distances, the last one included.

    Rows with as many values as each other are of one kind: those with held-out metrics are rare,
    and are thinned by themselves. No line is parsed.
    """
    kept: dict[int, list[tuple[int, bytes]]] = {}  # kind -> (index in the file, line)
    seen: dict[int, int] = {}
    every: dict[int, int] = {}
    last: dict[int, tuple[int, bytes]] = {}
    for index, line in enumerate(lines):
        kind = line.count(b":")
        count = seen.get(kind, 0)
        seen[kind] = count + 1
        last[kind] = index, line
        if count % every.setdefault(kind, 1):
            continue
        chosen = kept.setdefault(kind, [])
        chosen.append((index, line))
        if len(chosen) == 2 * most:
            kept[kind] = chosen[::2]
            every[kind] *= 2
    ordered = sorted({*itertools.chain(*kept.values()), *last.values()})
    return [line for _, line in ordered]
