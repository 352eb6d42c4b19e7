"""The one training step of every family."""

import zlib
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from genai_jax.training.ema import Average, init_ema, update_ema
from genai_jax.training.phase import Batch, Params, Phase, PyTree, Task


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes."""

    step: jax.Array  # steps done, int32
    params: Params
    mutables: PyTree
    opt_state: dict[str, Any]  # phase name -> optimizer state
    ema: dict[str, Params]  # name -> average
    rng: jax.Array  # base key; a step folds its number in


def init_state(task: Task, rng: jax.Array, averages: dict[str, Average]) -> TrainState:
    """A fresh state; meant to be traced, so that it is born sharded."""
    init_rng, step_rng = jax.random.split(rng)
    params, mutables = task.init(init_rng)
    phases = task.phases(params)
    opt_state = {
        phase.name: phase.optimizer.init({g: params[g] for g in phase.trains})
        for phase in phases
        if phase.slot == phase.name
    }
    ema = init_ema(_trained(phases, params), averages)
    return TrainState(jnp.int32(0), params, mutables, opt_state, ema, step_rng)


def _trained(phases: tuple[Phase, ...], params: Params) -> Params:
    """The groups that some phase updates: only they are averaged."""
    return {g: p for g, p in params.items() if any(g in phase.trains for phase in phases)}


def make_step(
    phases: tuple[Phase, ...], *, accumulate: int = 1, averages: dict[str, Average] | None = None
) -> Callable[[TrainState, Batch], tuple[TrainState, dict]]:
    """The step as a function (state, batch) -> (state, metrics), to be jitted.

    Runs the phases in order; each differentiates only the groups it trains. With `accumulate`, the
    batch of an update is cut into that many microbatches and their gradients are averaged, weighted
    by the metric "weight" where the loss reports one. Averages are updated last.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        rng = jax.random.fold_in(state.rng, state.step)
        metrics = {}
        for phase in phases:
            phase_rng = jax.random.fold_in(rng, zlib.crc32(phase.name.encode()))

            def run(state, phase=phase, phase_rng=phase_rng):
                return _run_phase(phase, state, batch, phase_rng, accumulate)

            if phase.every == 1:
                state, reported = run(state)
            else:
                idle = jax.tree.map(
                    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(run, state)[1]
                )
                state, reported = jax.lax.cond(
                    state.step % phase.every == 0, run, lambda s, idle=idle: (s, idle), state
                )
            prefix = f"{phase.name}/" if len(phases) > 1 else ""
            metrics.update({prefix + name: value for name, value in reported.items()})
        done = state.step + 1
        ema = update_ema(state.ema, _trained(phases, state.params), averages or {}, done)
        return state.replace(step=done, ema=ema), metrics

    return step


def phase_ran(phases: tuple[Phase, ...], metric: str, step: int) -> bool:
    """Whether a metric of step `step` (counted from 0) is a number of a phase that ran in it."""
    named = {phase.name: phase for phase in phases}
    owner = phases[0] if len(phases) == 1 else named[metric.split("/")[0]]
    return step % owner.every == 0


def _run_phase(phase, state, batch, rng, accumulate):
    parts = _split(batch, phase.repeats)
    for i in range(phase.repeats):
        part = jax.tree.map(lambda x, i=i: x[i], parts)
        state, metrics = _update(phase, state, part, jax.random.fold_in(rng, i), accumulate)
    return state, metrics


def _update(phase, state, batch, rng, accumulate):
    trained = {group: state.params[group] for group in phase.trains}
    gradient = jax.value_and_grad(
        lambda trained, mutables, batch, rng: phase.loss(
            {**state.params, **trained}, mutables, batch, rng
        ),
        has_aux=True,
    )
    (loss, (metrics, mutables)), grads = _accumulated(
        gradient, trained, state.mutables, batch, rng, accumulate
    )
    optimizer_state = state.opt_state[phase.slot]
    updates, optimizer_state = phase.optimizer.update(grads, optimizer_state, trained)
    trained = optax.apply_updates(trained, updates)
    state = state.replace(
        params={**state.params, **trained},
        mutables=mutables,
        opt_state={**state.opt_state, phase.slot: optimizer_state},
    )
    return state, {**metrics, "loss": loss, "grad_norm": optax.tree.norm(grads)}


def _accumulated(gradient, trained, mutables, batch, rng, count):
    """Loss, metrics and gradients averaged over `count` microbatches, one in memory at a time."""
    if count == 1:
        return gradient(trained, mutables, batch, rng)
    parts = _split(batch, count)
    first = jax.tree.map(lambda x: x[0], parts)

    def body(carry, inputs):
        mutables, totals, total_weight = carry
        index, part = inputs
        (loss, (metrics, mutables)), grads = gradient(
            trained, mutables, part, jax.random.fold_in(rng, index)
        )
        weight = metrics.get("weight", jnp.float32(1))
        totals = jax.tree.map(lambda t, x: t + weight * x, totals, (loss, metrics, grads))
        return (mutables, totals, total_weight + weight), None

    (loss, (metrics, _)), grads = jax.eval_shape(gradient, trained, mutables, first, rng)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (loss, metrics, grads))
    start = (mutables, zeros, jnp.float32(0))
    (mutables, totals, weight), _ = jax.lax.scan(body, start, (jnp.arange(count), parts))
    loss, metrics, grads = jax.tree.map(lambda t: t / jnp.maximum(weight, 1e-9), totals)
    if "weight" in metrics:
        metrics["weight"] = weight
    return (loss, (metrics, mutables)), grads


def _split(batch: Batch, count: int) -> Batch:
    """[rows, ...] -> [count, rows / count, ...]; row i in part i % count, on its own device."""
    split = lambda x: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0)
    return jax.tree.map(split, batch)
