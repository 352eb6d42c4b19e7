"""A stack of equal layers as a pipeline over the mesh axis `stage`.

In the form of Xu et al. 2021 (GSPMD, section 3.3): one array holds what every stage works on, its
first axis split over `stage`. All stages apply their layers at once, by `jax.vmap`, and a roll of
the array by one place, a collective permute, hands each microbatch to the next stage.

Microbatches may pass through the stages several times (`repeats`, the circular schedule of
Narayanan et al. 2021, section 2.2, with one microbatch per place): stage s then has the pieces s,
s + stages, ... of the layers. A step is `microbatches * repeats + stages - 1` ticks of one piece
each, of which `stages - 1` are idle on every device, so repeats and microbatches shrink the idle
share.

Layers are stored in order, whatever the schedule, so that a checkpoint does not depend on it. With
repeats > 1 a stage's pieces are not the layers that it stores: each device receives (and in the
backward pass sends back) a share 1 - 1 / stages of the parameters of its stage once a step.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from genai_jax.config import ConfigError
from genai_jax.networks.parallel.axes import (
    STAGE,
    ParallelConfig,
    axis_size,
    describe_axis,
    split_over,
)

PyTree = Any


def pipeline(
    apply_layers: Callable[[PyTree, PyTree, PyTree, jax.Array | None], PyTree],
    params: PyTree,
    x: PyTree,
    context: PyTree,
    config: ParallelConfig,
    key: jax.Array | None = None,
    policy: Callable | None = None,
    unit: str = "layers",
) -> PyTree:
    """Computes `apply_layers(params, x, context, key)` by stages and microbatches.

    Args:
      apply_layers: (parameters of consecutive layers [count, ...], x, context, key) -> x, for any
        number of layers and of rows; rows do not see each other.
      params: parameters of all layers, [num_layers, ...].
      x: arrays [batch, ...].
      context: arrays [batch, ...] that every layer receives.
      config: microbatches and repeats.
      key: key of dropout, from which every piece and microbatch gets its own; None for no dropout.
      policy: for repeats > 1, what the backward pass keeps instead of recomputing it; None keeps
        everything but weights. With one repeat `apply_layers` rematerializes by itself.
      unit: what one entry of params is, for error messages.

    Raises:
      ConfigError: the stages do not divide the layers, or the microbatches do not divide the rows.
    """
    check_pipeline(_length(params), _length(x), config, unit)
    stages, repeats = axis_size(STAGE), config.repeats
    microbatches = config.microbatches or stages
    # Row i goes to microbatch i % microbatches, so that rows stay on their devices.
    cut = lambda a: jnp.moveaxis(a.reshape(-1, microbatches, *a.shape[1:]), 1, 0)
    to_each_stage = lambda a: _staged(jnp.broadcast_to(a, (stages, *a.shape)))
    # What waits to enter stage 0, or has left the last one; only the part of stage 0 matters.
    waiting = jax.tree.map(lambda a: to_each_stage(cut(a)), (x, context))
    working = jax.tree.map(lambda a: jnp.zeros_like(a[:, 0]), waiting)
    pieces = jax.tree.map(lambda a: _pieces(a, stages, repeats), params)
    numbers = jnp.arange(stages)

    def enter(waiting, working, number, tick):
        """What a stage begins with; working: output of the previous stage in the previous tick."""
        (kept, contexts), (x, context) = waiting, working
        kept = jax.tree.map(lambda a, new: _put(a, new, tick - stages), kept, x)
        entering = jax.tree.map(lambda a: _take(a, tick % microbatches), (kept, contexts))
        working = jax.tree.map(lambda a, b: jnp.where(number == 0, a, b), entering, (x, context))
        return (kept, contexts), working

    def work(pieces, working, tick):
        """One tick of all stages."""
        if repeats > 1:
            turns = jnp.clip((tick - numbers) // microbatches, 0, repeats - 1)
            pieces = jax.tree.map(lambda a: _staged(jax.vmap(_take)(a, turns)), pieces)
        keys = None
        if key is not None:
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, tick * stages + numbers)
        return jax.vmap(apply_layers, spmd_axis_name=STAGE)(pieces, *working, keys)

    if repeats > 1:  # else each tick would save the parameters that it selects
        work = jax.checkpoint(work, policy=policy or _all_but_weights, prevent_cse=False)
    enter = jax.vmap(enter, (0, 0, 0, None), spmd_axis_name=STAGE)

    def turn(carry, tick):
        waiting, (x, context) = enter(*carry, numbers, tick)
        working = work(pieces, (x, context), tick), context
        return (waiting, jax.tree.map(lambda a: _staged(jnp.roll(a, 1, axis=0)), working)), None

    ticks = jnp.arange(microbatches * repeats + stages - 1)
    (waiting, working), _ = jax.lax.scan(turn, (waiting, working), ticks)
    # Back at stage 0 are all microbatches but the last one, which the last tick has just sent.
    whole = jax.tree.map(lambda a, new: a.at[:, -1].set(new), waiting[0], working[0])
    return jax.tree.map(lambda a: _of_first(a, numbers == 0), whole)


# Primitives that turn stored parameters into the weights of a matmul.
_OF_WEIGHTS = (
    "gather", "squeeze", "sharding_constraint", "convert_element_type", "reduce_precision",
    "reshape", "transpose",
)  # fmt: skip


def _all_but_weights(primitive, *_, **__) -> bool:
    """A policy for `jax.checkpoint` that saves all it can except parameters."""
    return primitive.name not in _OF_WEIGHTS


def check_pipeline(layers: int, rows: int, config: ParallelConfig, unit: str = "layers"):
    """Raises `ConfigError` for layers or rows that the stages of the mesh in use do not divide."""
    stages, repeats = axis_size(STAGE), config.repeats
    if stages == 1:
        return
    microbatches = config.microbatches or stages
    if layers % (stages * repeats):
        raise ConfigError(
            f"{layers} {unit} are not divisible by {stages * repeats}: "
            f"{describe_axis(STAGE)} x {repeats} repeats"
        )
    shards = math.prod(axis_size(axis) for axis in split_over("batch", rows))
    if rows % (microbatches * shards):
        raise ConfigError(
            f"a batch of {rows} rows is not divisible by {microbatches} microbatches x {shards} "
            "device(s) that share it"
        )
    if repeats > 1 and microbatches < stages:
        raise ConfigError(
            f"a pipeline of {repeats} repeats needs at least as many microbatches as stages: "
            f"{describe_axis(STAGE)}, but {microbatches} microbatches"
        )


def _length(tree: PyTree) -> int:
    return jax.tree.leaves(tree)[0].shape[0]


def _staged(a: jax.Array) -> jax.Array:
    """`a` with its first axis split over the stages and the others as they are."""
    spec = PartitionSpec(STAGE, *(PartitionSpec.UNCONSTRAINED,) * (a.ndim - 1))
    return jax.lax.with_sharding_constraint(a, spec)


def _pieces(a: jax.Array, stages: int, repeats: int) -> jax.Array:
    """[num_layers, ...] -> [stages, repeats, layers of a piece, ...], no second axis for one."""
    if repeats == 1:
        return _staged(a.reshape(stages, -1, *a.shape[1:]))
    return _staged(jnp.swapaxes(a.reshape(repeats, stages, -1, *a.shape[1:]), 0, 1))


def _take(a: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(a, index, 0, keepdims=False)


def _put(a: jax.Array, new: jax.Array, count: jax.Array) -> jax.Array:
    """`a` with `new` at place `count`, modulo its length; `a` if that is negative."""
    place = count % a.shape[0]
    new = jnp.where(count >= 0, new, _take(a, place))
    return jax.lax.dynamic_update_index_in_dim(a, new, place, 0)


def _of_first(a: jax.Array, is_first: jax.Array) -> jax.Array:
    """Stage 0's part of [stages, microbatches, rows, ...] as [batch, ...], for all stages."""
    mask = is_first.reshape(-1, *(1,) * (a.ndim - 1))
    a = jnp.sum(jnp.where(mask, a, 0), axis=0, dtype=a.dtype)
    return jnp.moveaxis(a, 0, 1).reshape(-1, *a.shape[2:])
