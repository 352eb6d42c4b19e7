"""Experts over a mesh: rows of tokens go to the devices of their experts, and come back.

With a capacity, an expert accepts a fixed number of tokens of a group and the others pass by
(Lepikhin et al. 2020, GShard; Fedus et al. 2022, Switch). Without one every choice is computed, by
a matmul whose rows are sorted by expert (Gale et al. 2022, MegaBlocks).

Every device of a mesh keeps the experts of its part of the `experts` axis; rows go there and come
back by an all-to-all. `jax.shard_map` spells out what goes where, so that the kernels of the
grouped matmul run inside it.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from genai_jax.config import ConfigError
from genai_jax.networks.experts.config import MoeConfig
from genai_jax.networks.experts.slots import (
    Places,
    assign,
    one_hot,
    to_slots,
    to_tokens,
    weights_of_slots,
)
from genai_jax.networks.layers.dense import activate
from genai_jax.networks.parallel.axes import (
    axis_size,
    free_axes,
    on_one_device,
    split_over,
    token_spec,
)
from kernels_pallas import grouped_matmul

Kernels = Mapping[str, jax.Array]
# (rows [..., in], kernels [experts, in, out]) -> [..., out], each row by the kernel of its expert.
ExpertMatmul = Callable[[jax.Array, jax.Array], jax.Array]
# (rows [..., embed], how to multiply them) -> [..., embed].
ExpertMlp = Callable[[jax.Array, ExpertMatmul], jax.Array]


class ExpertAxes(NamedTuple):
    """Mesh axes over which the experts' arrays are split; empty where they are not."""

    experts: tuple[str, ...] = ()  # experts, and the exchange of rows
    embed: tuple[str, ...] = ()  # kernels, gathered before use
    hidden: tuple[str, ...] = ()  # hidden width: outputs are summed over it
    out: tuple[str, ...] = ()  # last dimension of the sums: all of `hidden`, or nothing


def apply_experts(
    config: MoeConfig,
    activation: str,
    kernels: Kernels,
    x: jax.Array,
    choice: jax.Array,
    weight: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of the chosen experts' outputs, and which choices were computed.

    Each device of the mesh in use has its part of the tokens and of the experts. The sharding table
    says over which axes; those that do not divide a size are left out, and the devices along them
    compute the same.

    Args:
      config: capacity and exchange.
      activation: of the experts' MLPs.
      kernels: `up`, `down` and perhaps `gate`, [experts, in, out].
      x: [batch, length, embed].
      choice: [batch, length, choices] int32; num_experts for none.
      weight: [batch, length, choices].

    Returns:
      [batch, length, embed] and [batch, length, choices] bool.

    Raises:
      ConfigError: with a capacity, a length that is not divisible into groups.
    """
    apply_local = functools.partial(_apply_local_experts, config, activation)
    if on_one_device():
        return apply_local(ExpertAxes(), kernels, x, choice, weight)
    axes = _expert_axes(*kernels["up"].shape)
    up = PartitionSpec(axes.experts, axes.embed, axes.hidden)
    down = PartitionSpec(axes.experts, axes.hidden, axes.embed)
    tokens = token_spec(x.shape)
    out, computed = jax.shard_map(
        functools.partial(apply_local, axes),
        in_specs=({n: down if n == "down" else up for n in kernels}, tokens, tokens, tokens),
        out_specs=(PartitionSpec(*tokens, axes.out), tokens),
        axis_names=free_axes(),
        check_vma=False,
    )(kernels, x, choice, weight)
    return nn.with_logical_constraint(out, ("batch", "length", "activation_embed")), computed


def _expert_axes(experts: int, embed: int, hidden: int) -> ExpertAxes:
    over_hidden = split_over("mlp", hidden)
    divides = embed % math.prod(axis_size(axis) for axis in over_hidden) == 0
    return ExpertAxes(
        experts=split_over("experts", experts),
        embed=split_over("embed", embed),
        hidden=over_hidden,
        out=over_hidden if divides else (),
    )


def _apply_local_experts(config, activation, axes: ExpertAxes, kernels, x, choice, weight):
    """`apply_experts` for one device, which has these experts' kernels and these tokens."""
    if axes.embed:
        kernels = {
            name: jax.lax.all_gather(k, axes.embed, axis=2 if name == "down" else 1, tiled=True)
            for name, k in kernels.items()
        }
    mlp = functools.partial(_expert_mlp, kernels, activation)
    apply_choices = apply_with_capacity if config.capacity_factor else apply_dropless
    out, computed = apply_choices(axes.experts, config, mlp, x, choice, weight)
    if axes.out:
        out = jax.lax.psum_scatter(out, axes.out, scatter_dimension=2, tiled=True)
    elif axes.hidden:
        out = jax.lax.psum(out, axes.hidden)
    return out, computed


def _expert_mlp(kernels: Kernels, activation: str, x: jax.Array, matmul: ExpertMatmul) -> jax.Array:
    """The experts' MLPs on rows x [..., embed]."""
    gate = matmul(x, kernels["gate"]) if "gate" in kernels else None
    hidden = activate(matmul(x, kernels["up"]), gate, activation)
    return matmul(checkpoint_name(hidden, "mlp_hidden"), kernels["down"])


def apply_with_capacity(axis, config: MoeConfig, mlp: ExpertMlp, x, choice, weight):
    """Each expert accepts the first tokens of a group that chose it, best choices first.

    Arguments and results are those of `apply_experts` on one device; `axis` is where rows are
    exchanged.

    Raises:
      ConfigError: a length that is not divisible into groups.
    """
    _, length, choices = choice.shape
    group = _group_size(config, length)
    capacity = min(group, math.ceil(config.capacity_factor * choices * group / config.num_experts))
    grouped = lambda a: a.reshape(-1, group, a.shape[-1])
    places = jax.vmap(lambda c: assign(c, config.num_experts, capacity))(grouped(choice))
    places = checkpoint_name(places, "places")
    sent = jax.vmap(to_slots)(grouped(x), places)  # [groups, experts x capacity, embed]
    received = _exchange(sent, axis, 1)  # [groups, devices x own experts x capacity, embed]
    by_expert = received.reshape(received.shape[0], _devices(axis), -1, capacity, x.shape[-1])
    matmul = lambda rows, kernels: jnp.einsum("gdeci,eio->gdeco", rows, kernels)
    outputs = mlp(by_expert, matmul)
    returned = _exchange(outputs.reshape(received.shape), axis, 1)
    out, computed = jax.vmap(_weighted_sums)(returned, places, grouped(weight))
    return out.reshape(x.shape), computed.reshape(choice.shape)


def _group_size(config: MoeConfig, length: int) -> int:
    if config.group_size is None:
        return length
    group = min(config.group_size, length)
    if length % group:
        raise ConfigError(f"a row of {length} tokens is not divisible into groups of {group}")
    return group


def apply_dropless(axis, config: MoeConfig, mlp: ExpertMlp, x, choice, weight):
    """Every choice is computed, unless the exchange between devices is bounded and too full.

    Arguments and results are those of `apply_experts` on one device; `axis` is where rows are
    exchanged.
    """
    tokens, choices = x.reshape(-1, x.shape[-1]), choice.reshape(-1, choice.shape[-1])
    devices = _devices(axis)
    if devices == 1:
        out, places = _apply_sorted(config.num_experts, mlp, tokens, choices)
    else:
        own = config.num_experts // devices
        places = assign(choices // own, devices, _exchanged_rows(config, devices, *choices.shape))
        places = checkpoint_name(places, "places")
        # Rows carry the number of their expert on the device they go to; `own` marks an empty row.
        number = jnp.append((choices % own).T.reshape(-1), own)[places.source]
        received = _exchange(to_slots(tokens, places), axis, 0)
        numbers = _exchange(number, axis, 0)[:, None]
        outputs, inner_places = _apply_sorted(own, mlp, received, numbers)
        out = _exchange(to_tokens(outputs, inner_places), axis, 0)
    out, computed = _weighted_sums(out, places, weight.reshape(choices.shape))
    return out.reshape(x.shape), computed.reshape(choice.shape)


def _exchanged_rows(config: MoeConfig, devices: int, tokens: int, choices: int) -> int:
    """Most rows that one device sends to another: all that could go, or as the factor says."""
    most = tokens * min(choices, config.num_experts // devices)
    if not config.exchange_factor:
        return most
    return min(most, math.ceil(config.exchange_factor * tokens * choices / devices))


def _apply_sorted(
    experts: int, mlp: ExpertMlp, tokens: jax.Array, choices: jax.Array
) -> tuple[jax.Array, Places]:
    """(outputs of all choices, sorted by expert; their places)."""
    places = checkpoint_name(assign(choices, experts, None), "places")
    sizes = jnp.sum(one_hot(choices, experts), (0, 1), dtype=jnp.int32)
    matmul = lambda rows, kernels: grouped_matmul(rows, kernels, sizes)
    return mlp(to_slots(tokens, places), matmul), places


def _devices(axis) -> int:
    return jax.lax.axis_size(axis) if axis else 1


def _exchange(rows: jax.Array, axis, dimension: int) -> jax.Array:
    """Part i of a dimension goes to device i; what comes from device i becomes part i."""
    if not axis:
        return rows
    return jax.lax.all_to_all(rows, axis, dimension, dimension, tiled=True)


def _weighted_sums(outputs: jax.Array, places: Places, weight: jax.Array):
    """Each token's sum of outputs [slots, embed] by weight [tokens, choices], and which exist."""
    scaled = outputs * weights_of_slots(weight, places)[:, None]
    return to_tokens(scaled.astype(outputs.dtype), places), (places.slot < outputs.shape[0]).T
