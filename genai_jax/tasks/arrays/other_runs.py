"""Other runs on images whose models a task builds on."""

from typing import Any

import jax
import jax.numpy as jnp

from genai_jax.components import open_run
from genai_jax.config import Config, ConfigError
from genai_jax.tasks.arrays.data import ArrayData
from genai_jax.training.workdir import read_record


def open_fitting(cls: type, workdir: str, flag: str, data: ArrayData) -> Config:
    """The configuration of a run that was trained on images like those of `data`.

    Args:
      cls: class of the task that the run must have.
      workdir: folder of the run.
      flag: the flag that named it, with its dashes, for error messages.
      data: the data to use its model on.

    Raises:
      ConfigError: there is no run, it is a run of another task, or its images have another shape or
        number of levels.
    """
    config = open_run(cls, workdir, flag)
    trained_on = read_record(workdir).get("data", {})
    for name, now in (("shape", list(data.shape)), ("levels", data.levels)):
        before = trained_on.get(name, now)
        if before != now:
            raise ConfigError(
                f"{flag}={workdir} was trained on images of {name} {before}; "
                f"--data.dataset={data.loader.config.dataset} has {now}"
            )
    return config


def best_average(config: Config) -> str | None:
    """The average of a run that other runs use: ``--ema.use``, or else the first that it kept."""
    return config.ema.use or next(iter(config.ema.averages()), None)


def zeros_like(function: Any, *args: Any) -> Any:
    """Zeros shaped like the result of a function, which is not run."""
    shapes = jax.eval_shape(function, *args)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
