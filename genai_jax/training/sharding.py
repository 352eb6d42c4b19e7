"""Sharding is a table: parameter path -> logical axes -> mesh axes."""

import contextlib
import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from genai_jax.config import ConfigError, field
from genai_jax.tasks.protocol import ArraySpec
from genai_jax.training.trees import path_name

MESH_AXES = ("data", "fsdp", "tensor", "expert", "sequence", "stage")

# Logical axis -> mesh axes. Axes that are not listed are never split.
LOGICAL_AXES = {
    "batch": ("data", "fsdp", "expert"),
    "length": ("sequence",),
    "embed": ("fsdp",),
    "vocabulary": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    # Only the output features of a convolution are split: XLA's partitioner computes a wrong
    # gradient of a strided convolution if both sides are (jax 0.10.2, 2 x 2 x 2 devices).
    "features": ("fsdp", "tensor"),
    "experts": ("expert",),
    "layers": ("stage",),
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int = field(
        -1, "Copies of the parameters; -1 uses the remaining devices.", minimum=-1, changeable=True
    )
    fsdp: int = field(
        1, "Shards of the parameters and optimizer moments.", minimum=-1, changeable=True
    )
    tensor: int = field(1, "Shards of the attention heads and MLPs.", minimum=-1, changeable=True)
    expert: int = field(1, "Shards of the experts.", minimum=-1, changeable=True)
    sequence: int = field(1, "Shards of the sequence length.", minimum=-1, changeable=True)
    stage: int = field(1, "Pipeline stages.", minimum=-1, changeable=True)
    across_slices: str = field(
        "data", "Mesh axis whose outer part spans slices, over the data-center network.",
        choices=MESH_AXES, changeable=True,
    )  # fmt: skip

    def sizes(self) -> dict[str, int]:
        """Mesh axis -> size from the flags, which may be -1."""
        return {axis: getattr(self, axis) for axis in MESH_AXES}


# From the outside in: axes that communicate most are placed on neighboring devices.
PHYSICAL_ORDER = ("stage", "data", "fsdp", "sequence", "expert", "tensor")


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """The mesh that the flags describe, over `devices` (by default all of them)."""
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes()
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or 0 in sizes.values():
        raise ConfigError(
            f"mesh {_mesh_flags(sizes)}: sizes must be at least 1, but one of them may be -1 "
            "(--mesh.data by default)"
        )
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free:
        sizes[free[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        hint = "; JAX_NUM_CPU_DEVICES=8 simulates eight" if devices[0].platform == "cpu" else ""
        raise ConfigError(
            f"mesh {_mesh_flags(config.sizes())} does not fit {len(devices)} device(s): the "
            f"sizes must multiply to the number of devices, or to a divisor if one is -1{hint}"
        )
    order = [MESH_AXES.index(axis) for axis in PHYSICAL_ORDER]
    arranged = _arrange(
        {axis: sizes[axis] for axis in PHYSICAL_ORDER}, config.across_slices, devices
    )
    # Linen's partitioning needs Auto axes; the default became Explicit in jax 0.9.
    kinds = (AxisType.Auto,) * len(MESH_AXES)
    return Mesh(np.transpose(arranged, np.argsort(order)), MESH_AXES, axis_types=kinds)


def _arrange(sizes: dict[str, int], across: str, devices: list) -> np.ndarray:
    """Arranges the devices in an array of these sizes, keeping network neighbors together."""
    slices = len({getattr(d, "slice_index", None) or 0 for d in devices})
    if slices > 1:
        if sizes[across] % slices:
            raise ConfigError(
                f"--mesh.{across}={sizes[across]} is not divisible by the {slices} slices that it "
                "spans (--mesh.across_slices)"
            )
        outer = [slices if axis == across else 1 for axis in sizes]
        inner = [size // o for size, o in zip(sizes.values(), outer, strict=True)]
        return mesh_utils.create_hybrid_device_mesh(
            inner, outer, devices, allow_split_physical_axes=True
        )
    return mesh_utils.create_device_mesh(
        tuple(sizes.values()), devices, allow_split_physical_axes=True
    )


def _mesh_flags(sizes: dict[str, int]) -> str:
    return " x ".join(f"--mesh.{axis}={size}" for axis, size in sizes.items() if size != 1) or "1"


def logical_rules(mesh: Mesh) -> list[tuple[str, tuple[str, ...] | None]]:
    """The table for `flax.linen.logical_axis_rules`, without mesh axes of size 1."""
    return [(name, _active(axes, mesh) or None) for name, axes in LOGICAL_AXES.items()]


def _active(axes: tuple[str, ...], mesh: Mesh) -> tuple[str, ...]:
    return tuple(axis for axis in axes if mesh.shape[axis] > 1)


def logical_axes(params: Any, rules) -> Any:
    """A tree like `params` with the logical axes of every parameter, as tuples.

    Raises:
      ConfigError: a parameter that no rule matches, or whose rank differs from its rule's.
    """

    def find(path, leaf):
        name = path_name(path)
        for pattern, axes in rules:
            if re.search(pattern, name):
                if axes[:1] == (...,):  # any number of axes that are never split
                    axes = (None,) * (len(leaf.shape) - len(axes) + 1) + axes[1:]
                _check_rank(f"parameter {name}", leaf.shape, axes)
                return axes
        raise ConfigError(f"no sharding rule matches parameter {name} {leaf.shape}")

    return jax.tree_util.tree_map_with_path(find, params)


def spec_of(name: str, shape: tuple[int, ...], axes: tuple, mesh: Mesh) -> PartitionSpec:
    """The partition of one array; ConfigError for a size that its mesh axes do not divide."""
    parts = []
    for size, axis in zip(shape, axes, strict=True):
        mesh_axes = _active(LOGICAL_AXES.get(axis, ()), mesh)
        count = math.prod(mesh.shape[a] for a in mesh_axes)
        if size % count:
            flags = " x ".join(f"--mesh.{a}={mesh.shape[a]}" for a in mesh_axes)
            raise ConfigError(f"{name} {shape}: {axis} of size {size} is not divisible by {flags}")
        parts.append(mesh_axes if len(mesh_axes) > 1 else mesh_axes[0] if mesh_axes else None)
    return PartitionSpec(*parts)


def batch_shards(mesh: Mesh) -> int:
    """The number of devices, or groups of devices, that share the rows of a batch."""
    return math.prod(mesh.shape[axis] for axis in LOGICAL_AXES["batch"])


def batch_shardings(specs: Mapping[str, ArraySpec], mesh: Mesh) -> dict[str, NamedSharding]:
    """Shardings of the global batch."""
    return {
        name: NamedSharding(mesh, spec_of(f"batch entry {name}", x.shape, x.axes, mesh))
        for name, x in specs.items()
    }


def parameter_specs(params: Any, rules, mesh: Mesh) -> Any:
    """A tree like `params` with the partition of every parameter; raises as `spec_of` does."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf, axes: spec_of(f"parameter {path_name(path)}", leaf.shape, axes, mesh),
        params,
        logical_axes(params, rules),
    )


def state_shardings(state: Any, rules, mesh: Mesh, mutable_rules=()) -> Any:
    """Shardings of a whole `TrainState` of shapes.

    Parameters follow the table. Arrays of an average or an optimizer state follow the parameter
    that their path ends with, if they have its shape. Mutables follow `mutable_rules`. Everything
    else is replicated.
    """
    specs = parameter_specs(state.params, rules, mesh)
    by_name = {
        path_name(path): (leaf.shape, spec)
        for (path, leaf), spec in zip(
            jax.tree_util.tree_flatten_with_path(state.params)[0],
            jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec)),
            strict=True,
        )
    }

    def place(path, leaf):
        parts = path_name(path).split("/")
        for start in range(len(parts)):
            shape, spec = by_name.get("/".join(parts[start:]), (None, None))
            if shape is not None and shape == leaf.shape:
                return NamedSharding(mesh, spec)
        return NamedSharding(mesh, PartitionSpec())

    def place_mutable(path, leaf):
        name = path_name(path)
        axes = next((a for pattern, a in mutable_rules if re.search(pattern, name)), None)
        if axes is None:
            return NamedSharding(mesh, PartitionSpec())
        _check_rank(f"mutable {name}", leaf.shape, axes)
        return NamedSharding(mesh, spec_of(f"mutable {name}", leaf.shape, axes, mesh))

    placed = jax.tree_util.tree_map_with_path(place, state)
    mutables = jax.tree_util.tree_map_with_path(place_mutable, state.mutables)
    return placed.replace(mutables=mutables)


def _check_rank(name: str, shape: tuple[int, ...], axes: tuple):
    if len(axes) != len(shape):
        raise ConfigError(f"{name} {shape} does not fit its axes {axes}")


def placements(params: Any, rules, mesh: Mesh) -> str:
    """One line per parameter: name, shape, partition, and the shape of the part on one device.

    `params` may be shapes, and the mesh may be abstract.
    """

    def line(path, x, spec):
        parts = ", ".join("+".join(axes_of(part)) or "-" for part in spec)
        local = NamedSharding(mesh, spec).shard_shape(x.shape)
        return f"{path_name(path)} {_dims(x.shape)} [{parts}] {_dims(local)}"

    specs = parameter_specs(params, rules, mesh)
    lines = jax.tree_util.tree_map_with_path(line, params, specs)
    return "\n".join(jax.tree.leaves(lines)) + "\n"


def axes_of(part) -> tuple[str, ...]:
    """The mesh axes that one dimension of a `PartitionSpec` names."""
    return (part,) if isinstance(part, str) else tuple(part or ())


def _dims(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


@contextlib.contextmanager
def mesh_context(mesh: Mesh):
    """Within this context, the logical axes of networks map to the axes of this mesh."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(logical_rules(mesh)):
        yield
