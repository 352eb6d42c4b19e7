"""Another run, whose model a task builds upon."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from genai_jax.config import Config, ConfigError
from genai_jax.training.restore import restore_model
from genai_jax.training.workdir import read_record


def read_fitting(workdir: str, flag: str, task: str, loader: Any) -> Config:
    """The configuration of the run in `workdir`.

    Args:
      workdir: its folder.
      flag: that named it, with its dashes.
      task: what it must be a run of.
      loader: an `ImageLoader` of the images that its model is to be used on.

    Raises:
      ConfigError: no run, one of another task, or one of images with another shape or other levels.
    """
    from genai_jax.components import read_config  # it imports the tasks

    config = read_config(workdir, flag)
    if config.run.task != task:
        raise ConfigError(f"{flag}={workdir} is a run of --task={config.run.task}, not {task}")
    trained_on = read_record(workdir).get("data", {})
    for name, now in (("shape", list(loader.shape)), ("levels", loader.levels)):
        before = trained_on.get(name, now)
        if before != now:
            raise ConfigError(
                f"{flag}={workdir} was trained on images of {name} {before}; "
                f"--data.dataset={loader.config.dataset} has {now}"
            )
    return config


def restore_to_host(task: Any, config: Config, *, averaged: bool = True) -> tuple[dict, Any]:
    """(params, mutables) of a run as numpy arrays; its average where it kept one, unless told."""
    average = config.ema.use or next(iter(config.ema.averages()), None) if averaged else "none"
    restored = restore_model(task, config, ema=average)
    everywhere = NamedSharding(restored.mesh, PartitionSpec())
    gather = jax.jit(lambda x: x, out_shardings=everywhere)
    return jax.device_get(gather((restored.params, restored.mutables)))


def zeros_like(function: Any, *args: Any) -> Any:
    """Zeros shaped as what a function returns, without running it."""
    shapes = jax.eval_shape(function, *args)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
