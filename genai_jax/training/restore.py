"""A trained model out of a workdir, for sampling and scoring."""

import math
import pathlib
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from genai_jax.config import Config, ConfigError
from genai_jax.training.checkpoint import Checkpointer
from genai_jax.training.phase import Params, PyTree, Task
from genai_jax.training.sharding import MeshConfig, make_mesh, mesh_context, state_shardings
from genai_jax.training.step import init_state
from genai_jax.training.workdir import read_record


def state_shapes(task: Task, config: Config, mesh: Mesh) -> Any:
    """The train state as `jax.ShapeDtypeStruct`s that know their sharding on `mesh`."""
    decays = config.ema.decays()
    with mesh_context(mesh):
        shapes = jax.eval_shape(lambda rng: init_state(task, rng, decays), jax.random.key(0))
    shardings = state_shardings(shapes, task.partition_rules, mesh)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


class Restored(NamedTuple):
    """A model, on a mesh of this machine's devices."""

    step: int
    params: Params
    mutables: PyTree
    mesh: Mesh


def _mesh_here(config: Config) -> Mesh:
    """The run's own mesh; where that does not fit, the devices that share the batch evenly."""
    try:
        mesh = make_mesh(config.mesh)
        if config.data.batch_size % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0:
            return mesh
    except ConfigError:
        pass
    count = math.gcd(len(jax.devices()), config.data.batch_size)
    return make_mesh(MeshConfig(), jax.devices()[:count])


def restore_model(
    task: Task, config: Config, *, step: int | None = None, ema: str | None = None
) -> Restored:
    """Restores the parameters of a run, or an average of them, copied to this machine's devices.

    Raises:
      ConfigError: no such checkpoint or average, or data that the run was not trained on.
    """
    workdir = pathlib.Path(config.run.workdir)
    task.check_data(read_record(workdir).get("data", {}))
    if ema is not None and ema not in config.ema.decays():
        kept = ", ".join(config.ema.decays()) or "none"
        raise ConfigError(f"--ema={ema} is not an average of this run; it kept: {kept}")
    mesh = _mesh_here(config)
    checkpointer = Checkpointer(workdir / "checkpoints", config.checkpoint, read_only=True)
    restored = checkpointer.restore(state_shapes(task, config, mesh), step)
    checkpointer.close()
    if restored is None:
        raise ConfigError(f"no checkpoint in --workdir={workdir}: the run has not saved one yet")
    step, state, _, _ = restored
    return Restored(step, state.ema[ema] if ema else state.params, state.mutables, mesh)
