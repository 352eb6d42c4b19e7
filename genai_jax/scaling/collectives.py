"""What a compiled program sends between devices: kind, mesh axes, bytes, time on the links."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from genai_jax.scaling.chips import Chip
from genai_jax.scaling.program import Instruction, Program, executed

GATHER = "all-gather"
KINDS = (GATHER, "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# In TPU programs, a reduce-scatter is a fusion of an all-reduce with a slice of its result.
FUSED_SCATTER = "all-reduce-scatter"


class Collective(NamedTuple):
    """One collective instruction."""

    kind: str
    axes: tuple[str, ...]  # mesh axes along which the devices of a group differ
    size: int  # devices per group
    bytes: float  # of the whole array: the output of a gather, the input of all others
    times: int  # executions per step
    hidden: bool  # asynchronous: runs in parallel with computation
    loop: str  # body of the innermost loop, empty outside loops
    seconds: float = 0.0  # on the links, all executions together
    name: str = ""

    @property
    def sent(self) -> float:
        """Bytes that a device sends per step with ring algorithms, all executions together."""
        share = (self.size - 1) / max(self.size, 1)
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return self.times * self.bytes * factor


def collectives(program: Program, mesh: Mesh, chip: Chip | None) -> list[Collective]:
    """All collectives of a program compiled for `mesh`; without a chip, `seconds` are 0."""
    result = []
    for run in executed(program, into_fusions=True):
        instruction = run.instruction
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        if run.where.startswith(FUSED_SCATTER) and kind == "all-reduce":
            kind = "reduce-scatter"
        group = _group(instruction, mesh.devices.size)
        if len(group) < 2:
            continue
        operands = [program.computations[run.where][name] for name in instruction.operands]
        item = Collective(
            kind=kind,
            axes=_axes(group, mesh),
            size=len(group),
            bytes=float(sum(o.bytes for o in operands)) * (len(group) if kind == GATHER else 1),
            times=run.times,
            hidden=instruction.opcode.endswith("-start") or "async" in run.where,
            loop=run.loop,
            name=instruction.name,
        )
        result.append(item._replace(seconds=_seconds(item, group, mesh, chip)))
    return result


def _group(instruction: Instruction, count: int) -> np.ndarray:
    """The first group of devices, by their numbers in the program."""
    text = instruction.attributes
    if instruction.opcode.startswith("collective-permute"):
        pairs = re.findall(r"\{(\d+),(\d+)\}", text.split("source_target_pairs=", 1)[1])
        moves = [(int(a), int(b)) for a, b in pairs if a != b]
        return np.array(moves[0] if moves else (0,))
    listed = re.search(r"replica_groups=\{(\{[\d,]*\})", text)
    if listed:
        return np.array([int(n) for n in re.findall(r"\d+", listed[1])])
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        shape, sizes, order = (_numbers(part) for part in iota.groups())
        numbers = np.arange(math.prod(sizes)).reshape(sizes)
        return numbers.transpose(order or range(len(sizes))).reshape(shape)[0]
    named = re.search(r"replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", text)
    if named:
        return _named_group(*named.groups())
    return np.arange(count)


def _named_group(sizes: str, order: str, axes: str) -> np.ndarray:
    """Parses ``mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}``, where the ids are optional."""
    names = re.findall(r"'([^']+)'=(\d+)", sizes)
    shape = [int(size) for _, size in names]
    numbers = np.arange(math.prod(shape))
    iota = re.search(r"\[([\d,]+)\]T\(([\d,]+)\)", order)
    if iota:
        numbers = numbers.reshape(_numbers(iota[1])).transpose(_numbers(iota[2]))
    elif re.search(r"\d+,\d+", order):
        numbers = np.array(_numbers(re.search(r"[\d,]+", order)[0]))
    numbers = numbers.reshape(shape)
    # A part of an axis is written 'a':(outer)size.
    taken = []
    for name, outer, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes):
        at = [n for n, _ in names].index(name)
        taken.append((at, int(outer or 1), int(part or shape[at])))
    index = [0] * len(shape)
    for at, outer, part in taken:
        step = shape[at] // (outer * part)
        index[at] = np.arange(part) * step
    grid = np.ix_(*[np.atleast_1d(i) for i in index])
    return numbers[grid].ravel()


def _numbers(text: str | None) -> list[int]:
    return [int(n) for n in text.split(",")] if text else []


def _axes(group: np.ndarray, mesh: Mesh) -> tuple[str, ...]:
    at = np.array(np.unravel_index(group, mesh.devices.shape))
    return tuple(n for n, places in zip(mesh.axis_names, at, strict=True) if np.ptp(places))


def _seconds(item: Collective, group: np.ndarray, mesh: Mesh, chip: Chip | None) -> float:
    """Time on the links: bytes divided by the bandwidth of the links that the group spans.

    A ring sends in both directions at once, and all dimensions of a torus work in parallel. In an
    all-to-all, each link carries the traffic of a quarter of the longest ring. Traffic between
    slices, or between hosts of GPUs, uses the network bandwidth of all group members there.
    """
    if chip is None:
        return 0.0
    devices = [mesh.devices.flat[i] for i in group]
    bandwidth, longest = _bandwidth(devices, mesh, chip)
    if item.kind == "all-to-all" and longest:
        return item.times * item.bytes * longest / 8 / chip.link
    if item.kind == "collective-permute":
        bandwidth = min(bandwidth, chip.link)
    return item.sent / bandwidth


def _bandwidth(devices: list, mesh: Mesh, chip: Chip) -> tuple[float, int]:
    """(bytes/s that a device can send within this group, longest dimension of the torus)."""
    slices = {getattr(d, "slice_index", None) or 0 for d in devices}
    parts = {d.process_index for d in devices} if chip.switched else slices
    if len(parts) > 1 or chip.switched:
        # The members of a slice or host share the traffic that comes from outside.
        members = len(devices) / len(parts)
        across = chip.network * members if len(parts) > 1 else math.inf
        return min(across, chip.link * (1 if chip.switched else 2)), 0
    places = np.array([d.coords for d in devices])
    every = np.array([d.coords for d in mesh.devices.flat])
    total, longest = 0.0, 1
    for used, whole in zip(places.T, every.T, strict=True):
        count, size = len(set(used.tolist())), len(set(whole.tolist()))
        if count > 1:
            closed = count == size and size % chip.ring == 0
            total += chip.link * (2 if closed else 1)
            longest = max(longest, count if closed else 2 * count)
    # Two devices of one chip: on-chip links, as fast as all other links of the chip together.
    return (total or 6 * chip.link), longest
