"""What a run says about schedules that are longer than it, or that a new length changes."""

import numpy as np

from genai_jax.config import Config
from genai_jax.training.optimizer import ENDLESS, learning_rate_schedule


def cut_schedules(config: Config) -> list[str]:
    """One line for each number of steps that is larger than those of the run."""
    steps = config.train.steps
    return [
        f"--{name}={value} goes beyond the end of the run at --train.steps={steps}"
        for name, value in config.items().items()
        if name in config.within_run() and value > steps
    ]


def changed_schedule(config: Config, step: int, steps: int | None) -> str | None:
    """What a new length of the run does to its learning rate; None if nothing.

    Args:
      config: with the new length.
      step: completed steps.
      steps: the length so far, if known.
    """
    now = config.train.steps
    if steps in (None, now) or config.optimizer.schedule in ENDLESS:
        return None
    before, after = (learning_rate_schedule(config.optimizer, n, np)(step) for n in (steps, now))
    if before == after:
        return None
    return (
        f"--optimizer.schedule={config.optimizer.schedule} now ends at step {now} instead of "
        f"{steps}: the learning rate of the next step is {after:.3g}, not {before:.3g}"
    )
