"""Compiles the training step of a run for devices that may be absent, and reports on it."""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from importlib import metadata
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from genai_jax.config import Config, ConfigError
from genai_jax.scaling.chips import CHIPS, Chip, Topology, machine_memory
from genai_jax.scaling.estimate import KERNEL_SHARE, estimate
from genai_jax.scaling.memory import breakdown, largest, local_bytes, refused
from genai_jax.scaling.program import parse
from genai_jax.scaling.whole_run import whole_run
from genai_jax.tasks.protocol import Fitted, batch_rows, step_spec
from genai_jax.training.execution import Compiled, build
from genai_jax.training.flops import flops_of
from genai_jax.training.sharding import mesh_context


class DoesNotFit(Exception):
    """The step needs more memory than a device has; `report` names the largest buffers."""

    def __init__(self, report: dict, needed: list[str]):
        super().__init__(needed[0])
        self.report = report | {"fits": False, "largest": needed}


class Built(NamedTuple):
    """A step, ready to compile, with the shapes of its inputs."""

    task: Any
    compiled: Compiled
    batch: dict[str, jax.ShapeDtypeStruct]


def prepared(task: Any, config: Config, mesh: Mesh) -> Built:
    """The training step of `task`, a `genai_jax.tasks.protocol.Task`; nothing is compiled yet.

    Raises:
      ConfigError: an axis of the mesh does not divide a dimension; a run without a step of one
        model.
    """
    if config.population.size > 1:
        raise ConfigError(
            f"--population.size={config.population.size}: only the step of a single model can be "
            "compiled; set it to 1"
        )
    if isinstance(task, Fitted):
        raise ConfigError(f"--task={config.run.task} is fitted in one pass; it has no step")
    compiled = build(task, config, mesh)
    batch = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=compiled.batch_shardings[name])
        for name, x in step_spec(task).items()
    }
    return Built(task, compiled, batch)


def check(config: Config, topology: Topology, built: Built) -> tuple[dict, str]:
    """Compiles; returns (report as a dictionary for JSON, text of the compiled program).

    Raises:
      DoesNotFit: the step needs more memory than a device has.
      ConfigError: the chip cannot run a kernel of the step.
    """
    report = facts(config, topology, built)
    start = time.perf_counter()
    with mesh_context(built.compiled.mesh):
        lowered = built.compiled.step.trace(built.compiled.shapes, built.batch).lower()
        try:
            program = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            buffers = refused(str(error))
            if buffers is None:
                raise
            if len(buffers) == 1:  # the compiler named none
                buffers += largest(built.compiled.shapes)
            raise DoesNotFit(report, buffers) from None
        except Exception as error:  # jax has no public name for it
            if "Mosaic failed to compile" not in str(error):
                raise
            raise ConfigError(
                f"--topology={topology.text}: the compiler cannot build a kernel of this run for "
                f"{topology.kind}; --compiles=false estimates the cost without it"
            ) from None
    report["compile_seconds"] = round(time.perf_counter() - start, 1)
    text = program.as_text()
    parsed = parse(text)
    report["memory"] = breakdown(program, parsed, built.compiled.shapes, built.batch)
    costs = program.cost_analysis() or {}
    report["compiler_flops"] = costs.get("flops")
    report |= _predicted(parsed, built.compiled.mesh, report, topology, config.run.dtype)
    if topology.chip is None:
        capacity = machine_memory() / len(built.compiled.mesh.devices.flat)
    else:
        capacity = topology.chip.memory
    report["capacity"] = int(capacity)
    report["fits"] = report["memory"]["total"] <= capacity
    if not report["fits"]:
        total = f"{report['memory']['total'] / 2**30:.2f} GiB of {capacity / 2**30:.2f}"
        raise DoesNotFit(report, [total, *largest(built.compiled.shapes)])
    return report, text


def facts(config: Config, topology: Topology, built: Built) -> dict:
    """The part of the report that is known before compiling."""
    mesh, state = built.compiled.mesh, built.compiled.shapes
    packages = ["jax", "libtpu"] if topology.compiler == "libtpu" else ["jax"]
    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "topology": topology.text,
        "slices": topology.slices,
        "devices": mesh.devices.size,
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "versions": versions,
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "state_bytes": local_bytes(state),
        "tokens_per_step": built.task.tokens_per_step(),
        "batch_size": batch_rows(step_spec(built.task)),
        **flops_of(built.task, config),
    }


def add_whole_run(report: dict, config: Config, topology: Topology, assumed_mfu: float):
    """Adds ``run``, see `whole_run`."""
    steps, dtype = config.train.steps, config.run.dtype
    report["run"] = whole_run(report, steps, dtype, topology, assumed_mfu)


def _predicted(program, mesh: Mesh, report: dict, topology: Topology, dtype: str) -> dict:
    """Counts of the program and, for a known chip, predicted step time and MFU."""
    chip = topology.chip
    rated = chip and dataclasses.replace(chip, flops=chip.peak(dtype))
    estimated = estimate(program, mesh, rated)
    table: dict[tuple, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for c in estimated.collectives:
        row = table[c.kind, "+".join(c.axes), "hidden" if c.hidden else "exposed"]
        row[0] += c.times
        row[1] += c.sent
        row[2] += c.seconds
    counted = {
        "program_flops": estimated.flops,
        "hbm_bytes": estimated.hbm_bytes,
        "collectives": [
            dict(kind=k, axes=a, overlap=o, times=n, bytes_sent=round(b), seconds=s)
            for (k, a, o), (n, b, s) in sorted(table.items(), key=lambda item: -item[1][1])
        ],
    }
    if chip is None:
        return counted
    model = report["flops_per_step"] / report["devices"]
    bounds = {
        "matrix units": estimated.flops / rated.flops,
        "memory": estimated.hbm_bytes / chip.hbm,
        "links": sum(c.seconds for c in estimated.collectives),
    }
    return counted | {
        "predicted": {
            "bounds_seconds": bounds,
            "compute_seconds": estimated.compute_seconds,
            "exposed_seconds": estimated.exposed_seconds,
            "step_seconds": estimated.seconds,
            "mfu": model / chip.flops / estimated.seconds,
            "roofline_mfu": model / chip.flops / max(bounds.values()),
        },
        "assumptions": assumptions(rated, dtype, estimated.silent_kernels),
    }


def assumptions(chip: Chip, dtype: str, silent_kernels: tuple[str, ...]) -> list[str]:
    """The assumptions behind the prediction; `chip` has the peak for matmuls in `dtype`."""
    cycles = (
        f"the compiler's cycle estimates for its fusions, at {chip.clock / 1e9:.2f} GHz"
        if chip.clock and not chip.switched
        else "the longer of FLOPs at peak rate and bytes at memory bandwidth"
    )
    slower = f" in {dtype}" if chip.flops != CHIPS[chip.name].flops else ""
    silent = [f"{name} takes no time, as it does not declare its FLOPs" for name in silent_kernels]
    return [
        f"peak {chip.flops / 1e12:.0f} TFLOP/s{slower}, memory {chip.hbm / 1e9:.0f} GB/s, "
        f"{chip.link / 1e9:.0f} GB/s per link and direction, network {chip.network / 1e9:.1f} GB/s",
        f"time of an instruction: {cycles}",
        "kernels run at the share of peak given in kernels_pallas/tuning.csv, or else at "
        f"{KERNEL_SHARE:.0%}",
        "synchronous collectives add to the time; asynchronous ones overlap with the computation "
        "of their loop",
        *silent,
        "a grouped matmul computes every row of its buffer, filled or not",
        "host, data loading, latencies and stragglers take no time; nothing was measured",
    ]
