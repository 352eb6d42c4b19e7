"""Progressive growing (Karras et al. 2018): a run starts with the layers of a smaller one."""

import math
import re
from typing import Any

import jax

from genai_jax.components import open_run
from genai_jax.config import ConfigError
from genai_jax.tasks.arrays.data import ArrayData
from genai_jax.tasks.protocol import Transfer
from genai_jax.training.trees import path_name
from genai_jax.training.workdir import read_record


def smaller_run(task: Any) -> tuple[Transfer, ...]:
    """The layers of a `Gan` that a smaller run has, as it trained them.

    The parameters are those of training, not an average: both players continue the game.

    Raises:
      ConfigError: there is no such run, or it has another task, images that are not half as large,
        or layers of other shapes.
    """
    workdir, flag = task.config.gan.grow_from, "--gan.grow_from"
    config = open_run(type(task), workdir, flag)
    _check_half(workdir, read_record(workdir).get("data", {}), task.data)
    key = jax.random.key(task.config.run.seed)
    shapes, before = (jax.eval_shape(t.init, key)[0] for t in (task, type(task)(config)))
    _check_shapes(shapes, before, workdir)
    return tuple(
        Transfer(workdir, flag, f"params/{group}", f"params/{group}", partial=True)
        for group in shapes
    )


def _check_half(workdir: str, trained_on: dict, data: ArrayData):
    *space, channels = data.shape
    half = [*(n / 2 for n in space), channels]
    shape = trained_on.get("shape", half)
    if shape != half:
        expected = "x".join(str(math.floor(n)) for n in half[:-1])
        raise ConfigError(
            f"--gan.grow_from={workdir} was trained on images of shape {shape}; this run grows "
            f"from {expected} with {channels} channel(s)"
        )


def _check_shapes(shapes: dict, before: dict, workdir: str):
    now = {path_name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(shapes)}
    for path, leaf in jax.tree.leaves_with_path(before):
        name = path_name(path)
        if name not in now and not re.search(r"(from|to)_image_", name):
            raise ConfigError(f"--gan.grow_from={workdir} has {name}, which this run lacks")
        if now.get(name, leaf.shape) != leaf.shape:
            raise ConfigError(
                f"--gan.grow_from={workdir}: {name} has shape {leaf.shape} there and {now[name]} "
                "here; half the channels at twice the size keep the shapes"
            )
