"""The one training step of every family."""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from genai_jax.tasks.protocol import Batch, LossOutput, Params, Phase, PyTree, StepInfo, Task
from genai_jax.training.ema import Average, init_ema, update_ema
from genai_jax.training.trees import leaf_paths, matching_paths, overlay, select
from genai_jax.training.validate import check_loss


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes."""

    step: jax.Array  # steps completed, int32
    params: Params
    mutables: PyTree
    opt_state: dict[str, Any]  # phase name -> optimizer state
    ema: dict[str, Params]  # name -> average of what is trained
    rng: jax.Array  # base key; a step folds its number in


class StepReport(NamedTuple):
    """What a step says about itself, on the devices."""

    metrics: dict[str, jax.Array]  # prefixed with "phase/" where there are several phases
    can_learn: dict[str, jax.Array]  # phase name -> whether anything is left to learn from


def trained_paths(phase: Phase, params: Params) -> frozenset[str]:
    """The paths of the parameters that a phase updates; `params` may be shapes.

    Raises:
      ConfigError: an entry of `phase.trains` that matches nothing.
    """
    return matching_paths(params, phase.trains, f"phase {phase.name} trains")


def trained_by_any(phases: tuple[Phase, ...], params: Params) -> Params:
    """The parameters that some phase updates: only they are averaged."""
    return select(params, frozenset().union(*(trained_paths(p, params) for p in phases)))


def frozen_paths(phases: tuple[Phase, ...], params: Params) -> frozenset[str]:
    """The paths of the parameters that no phase updates; none of a task that has no phases."""
    if not phases:
        return frozenset()
    return frozenset(leaf_paths(params)) - frozenset(leaf_paths(trained_by_any(phases, params)))


def init_state(
    task: Task,
    rng: jax.Array,
    averages: dict[str, Average],
    phases_of: Callable[[Params], tuple[Phase, ...]] | None = None,
) -> TrainState:
    """A fresh state; meant to be traced, so that it is born sharded.

    `phases_of` replaces `task.phases`.
    """
    init_rng, step_rng = jax.random.split(rng)
    params, mutables = task.init(init_rng)
    phases = (phases_of or task.phases)(params)
    opt_state = {
        phase.name: phase.optimizer.init(select(params, trained_paths(phase, params)))
        for phase in phases
        if phase.slot == phase.name
    }
    ema = init_ema(trained_by_any(phases, params), averages)
    return TrainState(jnp.int32(0), params, mutables, opt_state, ema, step_rng)


def make_step(
    phases: tuple[Phase, ...],
    *,
    accumulate: int = 1,
    averages: dict[str, Average] | None = None,
    materialize: Callable[[Params], Params] = lambda params: params,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepReport]]:
    """The step as a function (state, batch) -> (state, report), to be jitted.

    Runs the phases in order; each differentiates only what it trains. With `accumulate`, the batch
    of an update is cut into that many microbatches and their gradients are averaged, weighted by
    `LossOutput.weight`. Averages are updated last. Losses see `materialize(params)`.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepReport]:
        rng = jax.random.fold_in(state.rng, state.step)
        metrics, can_learn = {}, {}
        for phase in phases:
            phase_rng = jax.random.fold_in(rng, zlib.crc32(phase.name.encode()))

            def run(state, phase=phase, phase_rng=phase_rng):
                return _run_phase(phase, state, batch, phase_rng, accumulate, materialize)

            if phase.every == 1:
                state, (reported, able) = run(state)
            else:
                idle = jax.tree.map(
                    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(run, state)[1]
                )
                idle = (idle[0], jnp.bool_(True))
                state, (reported, able) = jax.lax.cond(
                    state.step % phase.every == 0, run, lambda s, idle=idle: (s, idle), state
                )
            prefix = f"{phase.name}/" if len(phases) > 1 else ""
            metrics.update({prefix + name: value for name, value in reported.items()})
            can_learn[phase.name] = able
        done = state.step + 1
        trained = trained_by_any(phases, state.params)
        ema = update_ema(state.ema, trained, averages or {}, done)
        return state.replace(step=done, ema=ema), StepReport(metrics, can_learn)

    return step


def phase_ran(phases: tuple[Phase, ...], metric: str, step: int) -> bool:
    """Whether a metric of step `step` (counted from 0) is a number of a phase that ran in it."""
    by_name = {phase.name: phase for phase in phases}
    owner = phases[0] if len(phases) == 1 else by_name[metric.split("/")[0]]
    return step % owner.every == 0


def _run_phase(phase, state, batch, rng, accumulate, materialize):
    """Updates on slice after slice of the batch; the report is that of the last one."""
    slices = _split(batch, phase.repeats)

    def epoch(state, number):
        for i in range(phase.repeats):
            part = jax.tree.map(lambda x, i=i: x[i], slices)
            key = jax.random.fold_in(rng, number * phase.repeats + i)
            state, report = _update(phase, state, part, key, accumulate, materialize)
        return state, report

    if phase.epochs == 1:
        return epoch(state, 0)
    state, reports = jax.lax.scan(epoch, state, jnp.arange(phase.epochs))
    metrics, can_learn = jax.tree.map(lambda x: x[-1], reports)
    return state, (metrics, can_learn)


def _update(phase, state, batch, rng, accumulate, materialize):
    trained = select(state.params, trained_paths(phase, state.params))

    def loss(trained, mutables, batch, rng):
        params = materialize(overlay(state.params, trained))
        output = phase.loss(params, mutables, batch, StepInfo(rng, state.step))
        check_loss(phase, output, mutables)
        output = output._replace(
            weight=jnp.asarray(output.weight, jnp.float32),
            can_learn=jnp.asarray(output.can_learn, jnp.bool_),
        )
        return output.loss, output

    gradient = jax.grad(loss, has_aux=True)
    grads, output = _accumulated(gradient, trained, state.mutables, batch, rng, accumulate)
    optimizer_state = state.opt_state[phase.slot]
    updates, optimizer_state = phase.optimizer.update(grads, optimizer_state, trained)
    trained = optax.apply_updates(trained, updates)
    state = state.replace(
        params=overlay(state.params, trained),
        mutables=output.mutables,
        opt_state={**state.opt_state, phase.slot: optimizer_state},
    )
    metrics = {**output.metrics, "loss": output.loss, "grad_norm": optax.tree.norm(grads)}
    return state, (metrics, output.can_learn)


def _accumulated(gradient, trained, mutables, batch, rng, count) -> tuple[Params, LossOutput]:
    """Gradients and the loss's output over `count` microbatches, one in memory at a time."""
    if count == 1:
        return gradient(trained, mutables, batch, rng)
    parts = _split(batch, count)
    first = jax.tree.map(lambda x: x[0], parts)

    def body(carry, inputs):
        mutables, totals, total_weight, can_learn = carry
        index, part = inputs
        grads, output = gradient(trained, mutables, part, jax.random.fold_in(rng, index))
        numbers = output.loss, output.metrics, grads
        totals = jax.tree.map(lambda t, x: t + output.weight * x, totals, numbers)
        able = can_learn | output.can_learn
        return (output.mutables, totals, total_weight + output.weight, able), None

    grads, output = jax.eval_shape(gradient, trained, mutables, first, rng)
    numbers = output.loss, output.metrics, grads
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), numbers
    )
    start = (mutables, zeros, jnp.float32(0), jnp.bool_(False))
    (mutables, totals, weight, able), _ = jax.lax.scan(body, start, (jnp.arange(count), parts))
    loss, metrics, grads = jax.tree.map(lambda t: t / jnp.maximum(weight, 1e-9), totals)
    return grads, LossOutput(loss, metrics, mutables, weight, able)


def _split(batch: Batch, count: int) -> Batch:
    """[rows, ...] -> [count, rows / count, ...]; row i in part i % count, on its own device."""
    split = lambda x: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0)
    return jax.tree.map(split, batch)
