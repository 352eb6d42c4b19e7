"""Reads a compiled program: which instructions run, how often, and on which arrays.

The text is XLA's (`jax.stages.Compiled.as_text`) after partitioning, so all shapes are per device.
The body of a loop counts once per iteration (once in all if the trip count depends on data). Of
the branches of a conditional, the most expensive one counts, because devices wait for each other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from genai_jax.networks.flops import mean_taps

ITEM_BITS = {"pred": 8, "c64": 64, "c128": 128}  # other names hold the bits: s32, bf16, f8e4m3fn


class Array(NamedTuple):
    """One array of an instruction's result."""

    dtype: str
    shape: tuple[int, ...]
    space: int = 0  # memory space: 0 is HBM, 5 host memory, others are on the chip

    @property
    def bytes(self) -> int:
        digits = re.match(r"[a-z]+(\d+)", self.dtype)  # the type `token` has no size
        bits = ITEM_BITS.get(self.dtype, int(digits[1]) if digits else 0)
        return math.prod(self.shape) * bits // 8


class Instruction(NamedTuple):
    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]  # names in the same computation; for a constant, its value
    attributes: str  # the rest of the line
    is_root: bool

    @property
    def bytes(self) -> int:
        return sum(a.bytes for a in self.arrays)

    def called(self, attribute: str) -> list[str]:
        """Names of the computations that an attribute (calls, body, ...) lists."""
        listed = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
        return re.findall(r"[\w.\-]+", listed[1]) if listed else []


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
        start = _LINE.match(line)
        if start:
            instruction = _instruction(start[2], line[start.end() :], bool(start[1]))
            current[instruction.name] = instruction
    return Program(computations, entry)


def _instruction(name: str, rest: str, is_root: bool) -> Instruction:
    """Parses `rest`, which follows the equals sign: type opcode(operands), attributes."""
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
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return start + match.start()
    raise ValueError(f"no closing parenthesis in {text[:60]!r}")


def _space(array: str) -> int:
    space = re.search(r"S\((\d+)\)", array)
    return int(space[1]) if space else 0


class Executed(NamedTuple):
    """An instruction that runs."""

    times: int  # per step
    instruction: Instruction
    where: str  # computation that contains it
    loop: str  # body of the innermost loop, empty outside loops


def executed(program: Program, *, into_fusions: bool = False) -> Iterator[Executed]:
    """Every instruction that runs, starting at the entry.

    into_fusions: whether to include the instructions inside of fusions and asynchronous starts.
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
            costliest = max(branches, key=lambda b: work(program, b))
            yield from _walk(program, costliest, times, loop, into_fusions)
        elif opcode == "call":
            yield from _walk(program, *instruction.called("to_apply"), times, loop, into_fusions)
        elif into_fusions and (opcode == "fusion" or opcode.endswith("-start")):
            for inner in instruction.called("calls"):
                yield from _walk(program, inner, times, loop, into_fusions)


def trip_count(program: Program, loop: Instruction) -> int:
    """How often the body of a while instruction runs; 1 if this depends on data."""
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    (condition,) = loop.called("condition")
    limits = _constants(program, condition)
    return limits.pop() if len(limits) == 1 else 1


def _constants(program: Program, name: str) -> set[int]:
    """The scalar integer constants in the condition of a loop, including its fusions."""
    constants = set()
    for instruction in program.computations[name].values():
        if instruction.opcode == "constant" and instruction.arrays[0].dtype in (
            "s32",
            "u32",
            "s64",
        ):
            constants.add(int(instruction.operands[0]))
        for inner in instruction.called("calls"):
            constants |= _constants(program, inner)
    return constants


def work(program: Program, name: str) -> float:
    """A cost to compare branches by: the FLOPs, or if there are none, a little for each byte."""
    runs = list(_walk(program, name, 1, "", True))
    flops = sum(e.times * flops_of(e.instruction, program.computations[e.where]) for e in runs)
    return flops or 1e-6 * sum(e.times * e.instruction.bytes for e in runs)


def flops_of(instruction: Instruction, computation: Computation) -> float:
    """FLOPs of a dot or convolution, 2 per multiply-add, or those a kernel declares; else 0."""
    if instruction.opcode == "dot":
        left = computation[instruction.operands[0]].arrays[0].shape
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        sizes = [left[int(d)] for d in contracted[1].split(",") if d]
        return 2.0 * math.prod(instruction.arrays[0].shape) * math.prod(sizes)
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, computation)
    if instruction.opcode == "custom-call":
        declared = re.search(r'cost_estimate":\{"flops":"(\d+)"', instruction.attributes)
        return float(declared[1]) if declared else 0.0
    return 0.0


def _convolution_flops(instruction: Instruction, computation: Computation) -> float:
    """FLOPs of a convolution.

    The TPU compiler writes matmuls as convolutions, with batch dimensions as dilated windows.
    """
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
