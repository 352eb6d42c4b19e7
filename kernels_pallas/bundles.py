"""The instruction bundles of a compiled TPU kernel, read from the compiler's listing.

A TPU core issues one bundle of instructions per cycle. A Pallas kernel is one loop over its grid,
with a forward branch around each `pl.when` body, so the bundles of each body and the number of
times it runs give the cycles of a call without running it. Memory stalls are not counted: where
data arrives late, this is a lower bound.
"""

from __future__ import annotations

import pathlib
import re
from dataclasses import dataclass

FLAGS = "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"

_ADDRESS = re.compile(r"\s*(0x[0-9a-f]+|0)\s")
_BRANCH = re.compile(r"sbr\.rel \([^)]*\) target = \$region(\d+)")
_EMPTY_REGION = re.compile(r"Start/End empty region (\d+)")


@dataclass(frozen=True)
class Bundles:
    """Bundles of one grid step: `always`, and those of each `pl.when` body in program order."""

    always: int
    bodies: tuple[int, ...]
    spills: int  # vector stores to VMEM because registers ran out
    total: int


def read(folder, kernel: str) -> Bundles:
    """The listing of `kernel` in `folder`. ValueError unless there is exactly one."""
    listing = _only(folder, rf".*-{kernel}[.\d]*-\d+-final_bundles\.txt")
    usage = _only(folder, rf".*-{kernel}[.\d]*-\d+-final_hlo-static-per-bundle-utilization\.txt")
    rows = [
        line for line in listing.read_text(encoding="utf-8").splitlines() if _ADDRESS.match(line)
    ]
    at = [int(row.split()[0], 16) for row in rows]
    loop = next(a for a, row in zip(at, rows, strict=True) if "LB:" in row)
    back = max(a for a, row in zip(at, rows, strict=True) if "sbr.rel" in row)
    spans = list(_branches(at, rows, loop, back))
    holders = [s for s in spans if any(s[0] < t[0] and t[1] <= s[1] for t in spans)]
    bodies = tuple(stop - start for start, stop in spans if (start, stop) not in holders)
    return Bundles(back + 1 - loop - sum(bodies), bodies, _spills(usage), len(rows))


def _only(folder, pattern: str) -> pathlib.Path:
    paths = [p for p in pathlib.Path(folder).iterdir() if re.fullmatch(pattern, p.name)]
    if len(paths) != 1:
        raise ValueError(f"{len(paths)} listings match {pattern} in {folder}; expected one")
    return paths[0]


def _branches(at, rows, loop, back):
    """(address of a forward branch, address of its target), within the loop over the grid."""
    ends = {}
    for address, row in zip(at, rows, strict=True):
        for region in _EMPTY_REGION.findall(row):
            ends[region] = address
    for address, row in zip(at, rows, strict=True):
        branch = _BRANCH.search(row)
        if branch and loop < address < back and ends.get(branch.group(1), -1) > address:
            yield address, ends[branch.group(1)]


def _spills(usage: pathlib.Path) -> int:
    """The sum of the VSTORE:SPILL column."""
    lines = usage.read_text(encoding="utf-8").splitlines()
    names = next(line for line in lines if "VSTORE:SPILL" in line).split(", ")
    column = names.index("VSTORE:SPILL")
    counts = [line.split() for line in lines if re.fullmatch(r"[\d ]+", line.strip() or "x")]
    counts = [c for c in counts if len(c) == len(names)][1:]  # the first row is the capacity
    return sum(int(c[column]) for c in counts)
