"""Model FLOPs of a step: as the task counts them, or else counted from its losses."""

import jax

from genai_jax.networks.flops import count_flops
from genai_jax.tasks.protocol import Phase, StepInfo, Task
from genai_jax.training.step import TrainState, trained_paths
from genai_jax.training.trees import overlay, select

CONVENTION = (
    "matmuls and convolutions of every loss and its gradient, counted from the traced program; "
    "nothing for custom kernels"
)


def flops_per_step(task: Task, phases: tuple[Phase, ...], shapes: TrainState) -> dict:
    """`flops_per_step` and the `convention` they are counted by.

    A task may have a method `flops_per_step()` that returns these, and `inactive_parameters`.
    """
    if hasattr(task, "flops_per_step"):
        return task.flops_per_step()
    spec = getattr(task, "collected_spec", None) or task.data.batch_spec
    total = 0.0
    for phase in phases:
        rows = {
            name: jax.ShapeDtypeStruct((x.shape[0] // phase.repeats, *x.shape[1:]), x.dtype)
            for name, x in spec.items()
        }
        once = count_flops(_gradient(task, phase, shapes), *_shapes(phase, shapes), rows)
        total += once * phase.repeats * phase.epochs / phase.every
    return {"flops_per_step": total, "convention": CONVENTION}


def _shapes(phase: Phase, shapes: TrainState) -> tuple:
    """Of what is differentiated, and of the mutables."""
    plain = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    trained = select(shapes.params, trained_paths(phase, shapes.params))
    return plain(trained), plain(shapes.params), plain(shapes.mutables)


def _gradient(task: Task, phase: Phase, shapes: TrainState):
    def gradient(trained, params, mutables, batch):
        info = StepInfo(jax.random.key(0), 0)

        def loss(trained):
            merged = task.materialize(overlay(params, trained))
            return phase.loss(merged, mutables, batch, info).loss

        return jax.grad(loss)(trained)

    return gradient
