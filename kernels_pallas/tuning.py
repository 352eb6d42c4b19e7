"""Block sizes by chip and shape: a readable table that is looked up, without any search at run
time.

`tuning.csv` holds one row per kernel, device kind, dtype, head dim, length and mask kind, with the
blocks, the share of the chip's peak that they reach, and whether that was measured on the chip or
predicted from the compiler's bundles (`python -m kernels_pallas.tune`).
"""

from __future__ import annotations

import csv
import functools
import math
import pathlib
from typing import NamedTuple, get_type_hints

from .masks import Causal, Full, Mask, Prefix

TABLE = pathlib.Path(__file__).parent / "tuning.csv"
MASK_KINDS = ("full", "causal", "local")


class Row(NamedTuple):
    """One line of the table. `share` is the share of the device's peak, with a causal mask counted
    as half of a full one; `source` is "measured" or "predicted"."""

    kernel: str
    device: str
    dtype: str
    head_dim: int
    length: int
    mask: str
    q: int
    k: int
    sub_q: int
    ahead: int
    share: float
    source: str


def mask_kind(mask: Mask) -> str:
    """The kind under which `mask` is looked up."""
    if isinstance(mask, Full):
        return "full"
    return "causal" if isinstance(mask, Causal | Prefix) else "local"


@functools.cache
def table() -> tuple[Row, ...]:
    """All rows, in the order of the file."""
    return read()


def read() -> tuple[Row, ...]:
    """The rows in the file, not cached."""
    if not TABLE.exists():
        return ()
    with TABLE.open(newline="", encoding="utf-8") as file:
        return tuple(_row(line) for line in csv.DictReader(file))


def _row(line: dict) -> Row:
    return Row(**{name: kind(line[name]) for name, kind in get_type_hints(Row).items()})


@functools.lru_cache(maxsize=1024)
def lookup(
    kernel: str, device: str, dtype: str, head_dim: int, length: int, mask: str
) -> Row | None:
    """The nearest row for this kernel and device, or None.

    In order of importance: the same mask kind, the nearest head dim, the same dtype, the nearest
    length; distances in powers of two.
    """
    rows = [row for row in table() if (row.kernel, row.device) == (kernel, device)]

    def distance(row: Row):
        return (
            row.mask != mask,
            abs(math.log2(row.head_dim / head_dim)),
            row.dtype != dtype,
            abs(math.log2(row.length / length)),
        )

    return min(rows, key=distance, default=None)


def write(rows: list[Row]) -> None:
    """Writes the table, sorted."""
    with TABLE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(sorted(rows))
