"""What a run says about schedules that are longer than it, or that a new length changes."""

import numpy as np

from genai_jax.config import Config
from genai_jax.tasks.protocol import Task
from genai_jax.training.optimizer import ENDLESS, learning_rate_schedule


def cut_schedules(config: Config) -> list[str]:
    """One line for each number of steps that is larger than those of the run."""
    steps = config.train.steps
    return [
        f"--{name}={value} goes beyond the end of the run at --train.steps={steps}"
        for name, value in config.items().items()
        if name in config.within_run() and value > steps
    ]


def changed_schedules(task: Task, config: Config, step: int, steps: int | None) -> list[str]:
    """What a new length of the run does to its learning rate, and to the curriculum of its task.

    Args:
      task: of the run.
      config: with the new length.
      step: completed steps.
      steps: the length so far, if known.
    """
    if steps in (None, config.train.steps):
        return []
    notes = (changed_rate(config, step, steps), task.changed_length(step, steps))
    return [note for note in notes if note]


def changed_rate(config: Config, step: int, steps: int) -> str | None:
    """What another length than `steps` does to the learning rate; None if nothing."""
    now = config.train.steps
    if config.optimizer.schedule in ENDLESS:
        return None
    before, after = (learning_rate_schedule(config.optimizer, n, np)(step) for n in (steps, now))
    if before == after:
        return None
    return (
        f"--optimizer.schedule={config.optimizer.schedule} now ends at step {now} instead of "
        f"{steps}: the learning rate of the next step is {after:.3g}, not {before:.3g}"
    )
