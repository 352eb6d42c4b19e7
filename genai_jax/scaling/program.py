"""Reads a compiled program: what runs, how often, and what each instruction works on.

The text is XLA's (`jax.stages.Compiled.as_text`), after partitioning, so all shapes are those of
one device. A loop's body counts as often as the loop runs (once, where data decide); of the
branches of a conditional the one that computes most counts, as devices wait for each other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from genai_jax.networks.flops import mean_taps

ITEM_BITS = {"pred": 8, "c64": 64, "c128": 128}  # others say it: s32, bf16, f8e4m3fn


class Array(NamedTuple):
    """One array of an instruction's result."""

    dtype: str
    shape: tuple[int, ...]
    space: int = 0  # of memory: 0 is HBM, 5 the host's, others are on the chip

    @property
    def bytes(self) -> int:
        said = re.match(r"[a-z]+(\d+)", self.dtype)  # tokens have no size
        bits = ITEM_BITS.get(self.dtype, int(said[1]) if said else 0)
        return math.prod(self.shape) * bits // 8


class Instruction(NamedTuple):
    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]  # names, in the same computation; of a constant its value
    attributes: str  # the rest of the line
    is_root: bool

    @property
    def bytes(self) -> int:
        return sum(a.bytes for a in self.arrays)

    def called(self, attribute: str) -> list[str]:
        """Names of the computations that an attribute (calls, body, ...) lists."""
        found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
        return re.findall(r"[\w.\-]+", found[1]) if found else []


Computation = dict[str, Instruction]


class Program(NamedTuple):
    computations: dict[str, Computation]
    entry: str


_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{[^{}]*\})?")


def parse(text: str) -> Program:
    """The program in `text`."""
    computations, entry, current = {}, "", {}
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
            continue
        found = _LINE.match(line)
        if found:
            instruction = _instruction(found[2], line[found.end() :], bool(found[1]))
            current[instruction.name] = instruction
    return Program(computations, entry)


def _instruction(name: str, rest: str, is_root: bool) -> Instruction:
    """`rest`: what stands behind the equals sign: type opcode(operands), attributes."""
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode = rest[end:].split("(", 1)[0].strip()
    start = rest.index("(", end)
    stop = _closing(rest, start)
    arrays = tuple(
        Array(m[1], tuple(int(d) for d in m[2].split(",") if d), _space(m[0]))
        for m in _ARRAY.finditer(rest[:end])
    )
    inside = rest[start + 1 : stop]
    literal = opcode in ("constant", "parameter")
    operands = (inside,) if literal else tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, opcode, arrays, operands, rest[stop + 1 :], is_root)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return start + match.start()
    raise ValueError(f"no closing parenthesis in {text[:60]!r}")


def _space(array: str) -> int:
    found = re.search(r"S\((\d+)\)", array)
    return int(found[1]) if found else 0


class Executed(NamedTuple):
    """An instruction that runs."""

    times: int  # a step
    instruction: Instruction
    where: str  # the computation that it is in
    loop: str  # the innermost loop's body, empty outside of loops


def executed(program: Program, *, into_fusions: bool = False) -> Iterator[Executed]:
    """Every instruction that runs, from the entry on.

    into_fusions: also what fusions and asynchronous starts consist of.
    """
    yield from _walk(program, program.entry, 1, "", into_fusions)


def _walk(program, where, times, loop, into_fusions) -> Iterator[Executed]:
    for instruction in program.computations[where].values():
        yield Executed(times, instruction, where, loop)
        opcode = instruction.opcode
        if opcode == "while":
            (body,) = instruction.called("body")
            trips = times * trip_count(program, instruction)
            yield from _walk(program, body, trips, body, into_fusions)
        elif opcode == "conditional":
            branches = instruction.called("branch_computations") or (
                instruction.called("true_computation") + instruction.called("false_computation")
            )
            dearest = max(branches, key=lambda b: work(program, b))
            yield from _walk(program, dearest, times, loop, into_fusions)
        elif opcode == "call":
            yield from _walk(program, *instruction.called("to_apply"), times, loop, into_fusions)
        elif into_fusions and (opcode == "fusion" or opcode.endswith("-start")):
            for inner in instruction.called("calls"):
                yield from _walk(program, inner, times, loop, into_fusions)


def trip_count(program: Program, loop: Instruction) -> int:
    """How often the body of a while instruction runs; 1 if that depends on data."""
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    (condition,) = loop.called("condition")
    limits = _constants(program, condition)
    return limits.pop() if len(limits) == 1 else 1


def _constants(program: Program, name: str) -> set[int]:
    """The scalar integers that a loop's condition, and what it is fused from, compare with."""
    found = set()
    for instruction in program.computations[name].values():
        if instruction.opcode == "constant" and instruction.arrays[0].dtype in (
            "s32",
            "u32",
            "s64",
        ):
            found.add(int(instruction.operands[0]))
        for inner in instruction.called("calls"):
            found |= _constants(program, inner)
    return found


def work(program: Program, name: str) -> float:
    """FLOPs of a computation, or the bytes it makes where it has none, to tell branches apart."""
    found = list(_walk(program, name, 1, "", True))
    flops = sum(e.times * flops_of(e.instruction, program.computations[e.where]) for e in found)
    return flops or 1e-6 * sum(e.times * e.instruction.bytes for e in found)


def flops_of(instruction: Instruction, computation: Computation) -> float:
    """FLOPs of a dot or a convolution, 2 a multiply-add, or of a kernel that says so; else 0."""
    if instruction.opcode == "dot":
        left = computation[instruction.operands[0]].arrays[0].shape
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        sizes = [left[int(d)] for d in contracted[1].split(",") if d]
        return 2.0 * math.prod(instruction.arrays[0].shape) * math.prod(sizes)
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, computation)
    if instruction.opcode == "custom-call":
        said = re.search(r'cost_estimate":\{"flops":"(\d+)"', instruction.attributes)
        return float(said[1]) if said else 0.0
    return 0.0


def _convolution_flops(instruction: Instruction, computation: Computation) -> float:
    """The TPU compiler writes matmuls as convolutions, batch dimensions as dilated windows."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    left, kernel = (computation[name].arrays[0].shape for name in instruction.operands[:2])
    out = instruction.arrays[0].shape
    flops = 2.0 * math.prod(out) * kernel[labels[2].index("i")]
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    settings = dict(re.findall(r"(\w+)=([\w\-]+)", window[1])) if window else {}
    spatial = sorted(set(labels[1]) & set("0123456789"))
    for index, label in enumerate(spatial):

        def part(name: str, default: str, index=index) -> str:
            return settings[name].split("x")[index] if name in settings else default

        flops *= mean_taps(
            size=kernel[labels[2].index(label)],
            stride=int(part("stride", "1")),
            low=int(part("pad", "0_0").split("_")[0]),
            base=int(part("lhs_dilate", "1")),
            dilation=int(part("rhs_dilate", "1")),
            length=left[labels[1].index(label)],
            out=out[labels[3].index(label)],
        )
    return flops
