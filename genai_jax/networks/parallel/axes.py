"""The mesh in use as networks see it, and how they divide work over its axes."""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
from jax.sharding import AxisType, PartitionSpec

import kernels_pallas
from genai_jax.config import ConfigError, field

SEQUENCE, STAGE = "sequence", "stage"  # mesh axes
ORDERS = ("zigzag", "contiguous")


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How the mesh axes `sequence` and `stage` are used; the result does not depend on it."""

    sequence: str = field(
        "ring",
        "How attention works over the mesh axis `sequence`: pass keys around a ring, or exchange "
        "length for heads.",
        choices=("ring", "all_to_all"),
        changeable=True,
    )
    sequence_order: str = field(
        "zigzag",
        "Order of the tokens over the devices of a ring; zigzag balances causal attention.",
        choices=ORDERS,
        changeable=True,
    )
    microbatches: int | None = field(
        None,
        "Number of parts that the pipeline cuts a batch into; the number of stages if unset.",
        minimum=1,
        changeable=True,
    )
    repeats: int = field(
        1,
        "Number of times that a microbatch passes through all stages of the pipeline.",
        minimum=1,
        changeable=True,
    )


def axis_size(axis: str) -> int:
    """Devices along an axis of the mesh in use; 1 without it, or inside a shard_map over it."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return mesh.shape[axis] if kinds.get(axis, AxisType.Manual) != AxisType.Manual else 1


def describe_axis(axis: str) -> str:
    """The axis and its size, for error messages."""
    return f"mesh axis `{axis}` of size {axis_size(axis)}"


def split_over(logical: str, size: int) -> tuple[str, ...]:
    """The mesh axes over which a dimension of this size is split, by the sharding table in use.

    Axes that do not divide it, and those that a surrounding shard_map has made manual, are left
    out.
    """
    axes = dict(nn.get_logical_axis_rules()).get(logical) or ()
    dividing = []
    for axis in (axes,) if isinstance(axes, str) else axes:
        if axis_size(axis) > 1 and size % axis_size(axis) == 0:
            dividing.append(axis)
            size //= axis_size(axis)
    return tuple(dividing)


def size_one_axes() -> tuple[str, ...]:
    """The axes of size 1 of the mesh in use.

    A Pallas kernel must be inside a shard_map over all axes. Where one of them is not named in the
    specs, the gradients are summed over it, so these are named along with the batch.
    """
    mesh, free = jax.sharding.get_abstract_mesh(), free_axes()
    return tuple(name for name in mesh.axis_names if name in free and mesh.shape[name] == 1)


def free_axes() -> set[str]:
    """The axes of the mesh in use that no surrounding shard_map has made manual."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name for name, kind in kinds if kind != AxisType.Manual}


def on_one_device() -> bool:
    """Whether there is nothing to split: every free axis of the mesh in use has size 1."""
    return all(axis_size(axis) == 1 for axis in free_axes())


def token_spec(shape: tuple[int, ...]) -> PartitionSpec:
    """The partition of arrays [batch, length, ...] over all axes that split tokens."""
    rows = (*split_over("batch", shape[0]), *size_one_axes())
    return PartitionSpec(rows, split_over("length", shape[1]))


def token_order(config: ParallelConfig) -> str:
    """The order that `in_token_order` puts tokens in, one of the ring orders of kernels_pallas."""
    ring = axis_size(SEQUENCE) > 1 and config.sequence == "ring"
    return config.sequence_order if ring else "contiguous"


def in_token_order(
    batch: Mapping[str, jax.Array], config: ParallelConfig
) -> Mapping[str, jax.Array]:
    """Arrays [batch, length] with the tokens in the order in which the network expects them.

    A loss that is a sum over tokens is the same in every order, as long as positions go along.
    """
    if token_order(config) == "contiguous":
        return batch
    return {name: kernels_pallas.zigzag(x, axis_size(SEQUENCE)) for name, x in batch.items()}


def check_length(length: int, order: str = "contiguous"):
    """Raises `ConfigError` for a length that the mesh in use cannot split in this order."""
    size = axis_size(SEQUENCE)
    if length % size:
        raise ConfigError(f"length {length} is not divisible by {describe_axis(SEQUENCE)}")
    if order == "zigzag" and length % (2 * size):
        raise ConfigError(
            f"length {length} is not divisible by twice {describe_axis(SEQUENCE)}, which the "
            "zigzag order needs; change one or use the contiguous order"
        )
