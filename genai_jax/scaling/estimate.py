"""Predicts the time of a compiled step on absent chips.

For a TPU, the compiler annotates every fusion with its estimate in cycles; a custom kernel, which
is opaque to the compiler, runs at the share of peak that `kernels_pallas/tuning.csv` predicts.
Elsewhere an instruction takes the longer of its FLOPs at peak rate and its bytes at memory
bandwidth. A synchronous collective adds its time on the links; an asynchronous one overlaps with
the computation of its loop, and only the excess adds.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import NamedTuple

from jax.sharding import Mesh

from genai_jax.scaling.chips import Chip
from genai_jax.scaling.collectives import KINDS, Collective, collectives
from genai_jax.scaling.program import Computation, Instruction, Program, executed, flops_of
from kernels_pallas import tuning

KERNEL_SHARE = 0.5  # of peak, assumed for a kernel that the table does not cover
KERNELS = ("tpu_custom_call", "mosaic_gpu", "__gpu$xla.gpu.triton")  # targets of custom calls
# Instructions that neither compute nor move data.
FREE = {
    "parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "iota", "optimization-barrier", "async-done",
    "copy-done", "slice-done", "all-gather-done", "all-reduce-done", "collective-permute-done",
}  # fmt: skip
SLICES = ("dynamic-slice", "gather", "slice")


class Estimate(NamedTuple):
    """Counts and times of one step on one device."""

    flops: float  # of matmuls and kernels, including rematerialization
    hbm_bytes: float  # read and written
    compute_seconds: float
    exposed_seconds: float  # of collectives that do not overlap with computation
    collectives: list[Collective]
    silent_kernels: tuple[str, ...]  # kernels that declare no FLOPs, counted as 0

    @property
    def seconds(self) -> float:
        return self.compute_seconds + self.exposed_seconds


def estimate(program: Program, mesh: Mesh, chip: Chip | None) -> Estimate:
    """Counts and, if the chip is known, times of a program compiled for `mesh`."""
    flops = bytes_moved = 0.0
    silent = set()
    computing: dict[str, float] = defaultdict(float)  # body of the innermost loop -> seconds
    for run in executed(program):
        computation = program.computations[run.where]
        work = _flops(run.instruction, computation, program)
        moved = traffic(run.instruction, computation, program)
        flops += run.times * work
        if not work and any(name in run.instruction.attributes for name in KERNELS):
            silent.add(kernel_name(run.instruction))
        bytes_moved += run.times * moved
        if chip:
            kind = mesh.devices.flat[0].device_kind
            seconds = _seconds(run.instruction, computation, work, moved, chip, kind)
            computing[run.loop] += run.times * seconds
    sent = collectives(program, mesh, chip)
    exposed = 0.0
    for loop in {*computing, *(c.loop for c in sent)}:
        here = [c for c in sent if c.loop == loop]
        exposed += sum(c.seconds for c in here if not c.hidden)
        exposed += max(0.0, sum(c.seconds for c in here if c.hidden) - computing[loop])
    seconds = sum(computing.values())
    return Estimate(flops, bytes_moved, seconds, exposed, sent, tuple(sorted(silent)))


def _flops(instruction: Instruction, computation: Computation, program: Program) -> float:
    """FLOPs of an instruction, including the instructions inside of a fusion."""
    total = flops_of(instruction, computation)
    if instruction.opcode == "fusion":
        for name in instruction.called("calls"):
            inner = program.computations[name]
            total += sum(_flops(i, inner, program) for i in inner.values())
    return total


def _seconds(instruction, computation, flops, moved, chip: Chip, device_kind: str) -> float:
    cycles = re.search(r'estimated_cycles":"(\d+)"', instruction.attributes)
    if cycles and chip.clock:
        return int(cycles[1]) / chip.clock
    if instruction.opcode == "custom-call" and flops:
        share = _kernel_share(instruction, computation, device_kind)
        return flops / (chip.flops * share)
    collective = instruction.opcode in KINDS  # only its time on the links counts
    if collective or instruction.opcode in FREE or instruction.opcode.endswith(("-start", "-done")):
        return 0.0
    return max(flops / chip.flops, moved / chip.hbm)


def _kernel_share(instruction: Instruction, computation: Computation, device_kind: str) -> float:
    """Share of peak that the tuning table predicts for a kernel with this name and operands."""
    queries = [
        a for name in instruction.operands for a in computation[name].arrays if len(a.shape) == 4
    ]
    if not queries:
        return KERNEL_SHARE
    dtype = {"bf16": "bfloat16", "f16": "float16"}.get(queries[0].dtype, "float32")
    *_, length, head_dim = queries[0].shape
    row = tuning.lookup(kernel_name(instruction), device_kind, dtype, head_dim, length, "causal")
    return row.share if row else KERNEL_SHARE


def kernel_name(instruction: Instruction) -> str:
    """The name that the author of the kernel gave it, without XLA's numbering."""
    return re.match(r"[a-z_]+", instruction.name)[0].rstrip("_")


def traffic(instruction: Instruction, computation: Computation, program: Program) -> float:
    """Bytes that an instruction reads from and writes to main memory.

    A slice of an array counts with the size of the slice, an in-place update with that of the
    update.
    """
    opcode = instruction.opcode
    if opcode in FREE:
        return 0.0
    operands = [computation[name] for name in instruction.operands if name in computation]
    if opcode == "fusion":
        return _fusion_traffic(instruction, operands, program)
    if opcode == "dynamic-update-slice":
        return 2.0 * _in_memory(operands[1])
    if opcode.endswith("-start"):
        return _start_traffic(instruction, operands)
    written = _in_memory(instruction)
    if opcode in SLICES:
        return 2.0 * written
    return float(written + sum(_in_memory(o) for o in operands))


def _start_traffic(start: Instruction, operands: list[Instruction]) -> float:
    """Traffic of an asynchronous copy, slice or collective, whose result repeats its operands."""
    results = [a for a in start.arrays if a.shape]
    for array in (a for operand in operands for a in operand.arrays):
        if array in results:
            results.remove(array)
    read = min(sum(map(_in_memory, operands)), sum(a.bytes for a in results))
    return float(read + sum(a.bytes for a in results if a.space == 0))


def _in_memory(instruction: Instruction) -> int:
    return sum(a.bytes for a in instruction.arrays if a.space == 0)


def _fusion_traffic(fusion: Instruction, operands: list[Instruction], program: Program) -> float:
    body = program.computations[fusion.called("calls")[0]]
    users: dict[str, list[Instruction]] = defaultdict(list)
    for instruction in body.values():
        for name in instruction.operands:
            users[name].append(instruction)
    total = 0.0
    for parameter in (i for i in body.values() if i.opcode == "parameter"):
        whole = _in_memory(operands[int(parameter.operands[0])])
        total += min(whole, sum(_read(parameter, user, users) for user in users[parameter.name]))
    root = next(i for i in body.values() if i.is_root)
    results = [body[n] for n in root.operands] if root.opcode == "tuple" else [root]
    for array, result in zip(fusion.arrays, results, strict=False):
        while result.opcode in ("bitcast", "copy", "convert") and result.operands[0] in body:
            result = body[result.operands[0]]
        updated = result.opcode == "dynamic-update-slice"
        written = body[result.operands[1]].bytes if updated else array.bytes
        total += written if array.space == 0 else 0
    return total


def _read(value: Instruction, user: Instruction, users: dict) -> float:
    """Bytes of `value` that one of its users reads."""
    if user.opcode == "bitcast":
        return sum(_read(user, other, users) for other in users[user.name]) or value.bytes
    if user.opcode in SLICES and user.operands[0] == value.name:
        return user.bytes
    if user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
        return 0.0
    return value.bytes
