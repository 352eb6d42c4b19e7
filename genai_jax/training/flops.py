"""Model FLOPs of a step: as the task counts them, or else counted from its losses."""

import jax

from genai_jax.config import Config
from genai_jax.networks.flops import count_flops
from genai_jax.tasks.protocol import CountsFlops, Params, Phase, PyTree, StepInfo, Task, step_spec
from genai_jax.training.phases import phases_of
from genai_jax.training.step import trained_paths
from genai_jax.training.trees import overlay, select

CONVENTION = (
    "matmuls and convolutions of every loss and its gradient, counted from the traced program; "
    "nothing for custom kernels"
)


def flops_of(task: Task, config: Config) -> dict:
    """As `flops_per_step`, from the task's own shapes; nothing is allocated."""
    params, mutables = jax.eval_shape(task.init, jax.random.key(0))
    return flops_per_step(task, phases_of(task, config)(params), params, mutables)


def flops_per_step(task: Task, phases: tuple[Phase, ...], params: Params, mutables: PyTree) -> dict:
    """`flops_per_step` and the `convention` they are counted by.

    A task may have a method `flops_per_step()` that returns these, and `inactive_parameters`.
    """
    if isinstance(task, CountsFlops):
        return task.flops_per_step()
    spec = step_spec(task)
    total = 0.0
    for phase in phases:
        rows = {
            name: jax.ShapeDtypeStruct((x.shape[0] // phase.repeats, *x.shape[1:]), x.dtype)
            for name, x in spec.items()
        }
        trained = select(params, trained_paths(phase, params))
        once = count_flops(_gradient(task, phase), *_plain((trained, params, mutables)), rows)
        total += once * phase.repeats * phase.epochs / phase.every
    return {"flops_per_step": total, "convention": CONVENTION}


def _plain(tree: PyTree) -> PyTree:
    """Shapes without shardings."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _gradient(task: Task, phase: Phase):
    def gradient(trained, params, mutables, batch):
        info = StepInfo(jax.random.key(0), 0)

        def loss(trained):
            merged = task.materialize(overlay(params, trained))
            return phase.loss(merged, mutables, batch, info).loss

        return jax.grad(loss)(trained)

    return gradient
