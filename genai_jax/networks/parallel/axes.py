"""How the mesh axes `sequence` and `stage` divide the work of a network, beside their sizes."""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
from jax.sharding import AxisType

import kernels_pallas
from genai_jax.config import ConfigError, field

SEQUENCE, STAGE = "sequence", "stage"  # mesh axes
ORDERS = ("zigzag", "contiguous")


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """Choices that matter where the mesh has the axes; the result does not depend on them."""

    sequence: str = field(
        "ring",
        "attention over --mesh.sequence: keys go round, or length and heads are exchanged",
        choices=("ring", "all_to_all"),
        changeable=True,
    )
    sequence_order: str = field(
        "zigzag",
        "where a ring's devices have their tokens; zigzag balances causal attention",
        choices=ORDERS,
        changeable=True,
    )
    microbatches: int | None = field(
        None,
        "parts of the batch in the pipeline; as many as --mesh.stage if unset",
        minimum=1,
        changeable=True,
    )
    repeats: int = field(
        1, "times a microbatch goes round the pipeline's stages", minimum=1, changeable=True
    )


def axis_size(axis: str) -> int:
    """Devices along a mesh axis in use; 1 if there is none, or inside a shard_map over it."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return mesh.shape[axis] if kinds.get(axis, AxisType.Manual) != AxisType.Manual else 1


def split_over(logical: str, size: int) -> tuple[str, ...]:
    """The mesh axes over which a dimension of this size is split, by the sharding table in use.

    Axes that do not divide it, and those inside whose shard_map we are, are left out.
    """
    axes = dict(nn.get_logical_axis_rules()).get(logical) or ()
    taken = []
    for axis in (axes,) if isinstance(axes, str) else axes:
        if axis_size(axis) > 1 and size % axis_size(axis) == 0:
            taken.append(axis)
            size //= axis_size(axis)
    return tuple(taken)


def whole_axes() -> tuple[str, ...]:
    """The axes of size 1 of the mesh in use.

    A Pallas kernel has to be inside a shard_map over all axes. Where one of them is not named in
    the specs, the gradients are summed over it, so these are named along with the batch.
    """
    mesh, free = jax.sharding.get_abstract_mesh(), free_axes()
    return tuple(name for name in mesh.axis_names if name in free and mesh.shape[name] == 1)


def free_axes() -> set[str]:
    """The axes of the mesh in use that no shard_map around has made manual."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name for name, kind in kinds if kind != AxisType.Manual}


def token_order(config: ParallelConfig) -> str:
    """In which order `arranged` puts the tokens: one of kernels_pallas' orders of a ring."""
    ring = axis_size(SEQUENCE) > 1 and config.sequence == "ring"
    return config.sequence_order if ring else "contiguous"


def arranged(batch: Mapping[str, jax.Array], config: ParallelConfig) -> Mapping[str, jax.Array]:
    """Arrays [batch, length] with the tokens in the order in which the network takes them.

    A loss that is a sum over tokens is the same in every order, as long as positions go along.
    """
    if token_order(config) == "contiguous":
        return batch
    return {name: kernels_pallas.zigzag(x, axis_size(SEQUENCE)) for name, x in batch.items()}


def check_length(length: int, config: ParallelConfig):
    """Raises `ConfigError` for a length that the mesh in use cannot split."""
    size = axis_size(SEQUENCE)
    if length % size:
        raise ConfigError(f"length {length} is not divisible by --mesh.sequence={size}")
    if token_order(config) == "zigzag" and length % (2 * size):
        raise ConfigError(
            f"length {length} is not divisible by twice --mesh.sequence={size}, which zigzag needs;"
            " change one or set --parallel.sequence_order=contiguous"
        )
