"""Progressive growing (Karras et al. 2018): a run begins with the layers of a smaller one."""

import math
import re
from typing import Any

import jax

from genai_jax.config import ConfigError
from genai_jax.tasks.trained_run import restore_to_host
from genai_jax.training.sharding import path_name
from genai_jax.training.workdir import read_record


def smaller_groups(task: Any) -> dict:
    """Those layers of a `Gan` that a smaller one has, as it trained them: host arrays.

    The parameters are those of training, not an average: both players are to go on playing.

    Raises:
      ConfigError: no such run, one of another task, on images that are not half as large, or with
        layers of other shapes.
    """
    from genai_jax.components import read_config  # it imports the tasks

    workdir = task.config.gan.grow_from
    config = read_config(workdir, "--gan.grow_from")
    if config.run.task != "gan":
        raise ConfigError(f"--gan.grow_from={workdir} is a run of --task={config.run.task}")
    _check_half(workdir, read_record(workdir).get("data", {}), task.loader)
    smaller = type(task)(config)
    key = jax.random.key(task.config.run.seed)
    shapes, before = (jax.eval_shape(t.init, key)[0] for t in (task, smaller))
    _check_shapes(shapes, before, workdir)
    trained, _ = restore_to_host(smaller, config, averaged=False)
    return _shared(trained, shapes)


def _check_half(workdir: str, trained_on: dict, loader: Any):
    *space, channels = loader.shape
    half = [*(n / 2 for n in space), channels]
    found = trained_on.get("shape", half)
    if found != half:
        wanted = "x".join(str(math.floor(n)) for n in half[:-1])
        raise ConfigError(
            f"--gan.grow_from={workdir} was trained on images of {found}; this run grows from "
            f"{wanted} with {channels} channel(s)"
        )


def _check_shapes(shapes: dict, before: dict, workdir: str):
    now = {path_name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(shapes)}
    for path, leaf in jax.tree.leaves_with_path(before):
        name = path_name(path)
        if name not in now and not re.search(r"(from|to)_image_", name):
            raise ConfigError(f"--gan.grow_from={workdir} has {name}, which this run has not")
        if now.get(name, leaf.shape) != leaf.shape:
            raise ConfigError(
                f"--gan.grow_from={workdir}: {name} has shape {leaf.shape} there and {now[name]} "
                "here; half the channels at twice the size keep it"
            )


def _shared(trained: Any, shapes: Any) -> Any:
    """The part of `trained` that is in `shapes` as well."""
    if not isinstance(trained, dict):
        return trained
    return {name: _shared(x, shapes[name]) for name, x in trained.items() if name in shapes}
