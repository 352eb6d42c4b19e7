"""What a compiled step keeps in the memory of one device, by purpose."""

from __future__ import annotations

import math
import re
from typing import Any

import jax

from genai_jax.scaling.program import Program, executed, trip_count
from genai_jax.training.trees import path_name


def local_bytes(tree: Any) -> int:
    """Bytes per device of a tree of `jax.ShapeDtypeStruct`s with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def breakdown(compiled, program: Program, state: Any, batch: Any) -> dict[str, int]:
    """Bytes by purpose; "total" is what the step needs in device memory.

    "activations" and "gradients" are the arrays that loops over layers fill one row at a time;
    those with the shape of a parameter are gradients. "temporary" is everything else that the step
    needs besides its arguments. "host" is in host memory.
    """
    stats = compiled.memory_analysis()
    params = {
        x.sharding.shard_shape(x.shape)
        for x in jax.tree.leaves(state.params)
    }  # fmt: skip
    stacked = [(shape, size) for shape, space, size in stacked_buffers(program) if space == 0]
    activations = sum(size for shape, size in stacked if shape not in params)
    gradients = sum(size for shape, size in stacked if shape in params)
    activations = min(activations, stats.temp_size_in_bytes)
    gradients = min(gradients, stats.temp_size_in_bytes - activations)
    return {
        "parameters": local_bytes(state.params),
        "optimizer": local_bytes(state.opt_state),
        "averages": local_bytes((state.ema, state.mutables)),
        "batch": local_bytes(batch),
        "activations": activations,
        "gradients": gradients,
        "temporary": max(0, stats.temp_size_in_bytes - activations - gradients),
        "program": stats.generated_code_size_in_bytes,
        "total": stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.generated_code_size_in_bytes,
        "host": stats.host_temp_size_in_bytes + stats.host_argument_size_in_bytes,
    }


def stacked_buffers(program: Program) -> list[tuple[tuple[int, ...], int, int]]:
    """(shape, memory space, bytes) of each array that a loop fills one row at a time."""
    trips = {
        run.instruction.called("body")[0]: trip_count(program, run.instruction)
        for run in executed(program)
        if run.instruction.opcode == "while"
    }
    buffers = []
    for run in executed(program, into_fusions=True):
        if run.instruction.opcode != "dynamic-update-slice" or run.loop not in trips:
            continue
        (array,) = run.instruction.arrays
        if array.shape[:1] == (trips[run.loop],):
            buffers.append((array.shape, array.space, array.bytes))
    return buffers


def largest(state: Any, count: int = 5) -> list[str]:
    """The largest arrays of the state, by their size on one device."""
    parts = [
        (math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize, path_name(path), x)
        for path, x in jax.tree_util.tree_flatten_with_path(state)[0]
    ]
    top = sorted(parts, key=lambda part: -part[0])[:count]
    return [
        f"{size / 2**30:.2f} GiB {name} {x.sharding.shard_shape(x.shape)}" for size, name, x in top
    ]


def refused(message: str) -> list[str] | None:
    """The out-of-memory message of a compiler and its largest buffers; None for other errors."""
    if "RESOURCE_EXHAUSTED" not in message and "out of memory" not in message.lower():
        return None
    needed = re.search(
        r"Used [\d.]+\w of [\d.]+\w hbm|memory required .*?available HBM \([^)]*\)", message
    )
    lines = [needed[0]] if needed else [message.strip().splitlines()[0][:200]]
    sizes = re.findall(r"Size: (\S+)", message)
    shapes = re.findall(r"Shape: (\S+)", message)
    names = re.findall(r'Operator: op_name="([^"]*)"', message)
    for i, (size, shape) in enumerate(zip(sizes, shapes, strict=False)):
        if i == 5:
            break
        where = names[i].split("/")[-3:] if i < len(names) else []
        lines.append(f"{size} {shape} {'/'.join(where)}".rstrip())
    return lines
