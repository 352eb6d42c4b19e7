"""A trained model out of a workdir, for sampling and scoring."""

import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from genai_jax.config import Config, ConfigError
from genai_jax.training.checkpoint import Checkpointer
from genai_jax.training.ema_profiles import reconstruct
from genai_jax.training.phase import Params, PyTree, Task
from genai_jax.training.population import Population, member_config, take_member
from genai_jax.training.sharding import (
    MeshConfig,
    batch_shards,
    make_mesh,
    mesh_context,
    state_shardings,
)
from genai_jax.training.step import init_state
from genai_jax.training.workdir import read_record


def state_shapes(
    task: Task, config: Config, mesh: Mesh, init: Callable[[jax.Array], Any] | None = None
) -> Any:
    """The train state as `jax.ShapeDtypeStruct`s that know their sharding on `mesh`.

    init: rng -> state. A caller that compiles it afterwards, with these shardings, passes the very
    function, so that jax traces it once.
    """
    averages = config.ema.averages()
    if isinstance(task, Population):
        return task.state_shapes(averages, mesh)
    init = init or (lambda rng: init_state(task, rng, averages))
    with mesh_context(mesh):
        shapes = jax.eval_shape(jax.jit(init), jax.eval_shape(lambda: jax.random.key(0)))
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
    ema: str | None  # the average that `params` is, None for the parameters themselves


def _mesh_here(config: Config) -> Mesh:
    """The run's own mesh; where that does not fit, the devices that share the batch evenly."""
    try:
        mesh = make_mesh(config.mesh)
        if config.data.batch_size % batch_shards(mesh) == 0:
            return mesh
    except ConfigError:
        pass
    count = math.gcd(len(jax.devices()), config.data.batch_size)
    return make_mesh(MeshConfig(), jax.devices()[:count])


def restore_model(
    task: Task,
    config: Config,
    *,
    step: int | None = None,
    ema: str | None = None,
    member: int = 0,
) -> Restored:
    """Restores the parameters of a run, or an average of them, copied to this machine's devices.

    Args:
      task: of the run.
      config: of the run.
      step: of the checkpoint; the newest if None.
      ema: an average that the run kept, "width:W" for the power-function profile of that relative
        width out of its snapshots, "none" for the parameters; None for what ``--ema.use`` says.
      member: of a population, counted from 0.

    Raises:
      ConfigError: no such checkpoint, average or member, or data that the run was not trained on.
    """
    workdir = pathlib.Path(config.run.workdir)
    task.check_data(read_record(workdir).get("data", {}))
    ema = ema or config.ema.use or "none"
    kept = config.ema.averages()
    if ema != "none" and ema not in kept and not ema.startswith("width:"):
        raise ConfigError(
            f"--ema={ema} is not an average of this run; it kept: {', '.join(kept) or 'none'}"
        )
    mesh = _mesh_here(member_config(config, member))
    population = Population(type(task), config) if config.population.size > 1 else None
    checkpointer = Checkpointer(workdir / "checkpoints", config.checkpoint, read_only=True)
    shapes = state_shapes(population or task, config, mesh)
    averaged = _averaged(shapes, ema)  # groups that are never trained have no average
    groups = [f"params/{group}" for group in shapes.params if group not in averaged]
    average = [f"ema/{ema}"] if ema in kept else []
    restored = checkpointer.restore(shapes, step, ("mutables", *groups, *average))
    checkpointer.close()
    if restored is None:
        raise ConfigError(f"no checkpoint in --workdir={workdir}: the run has not saved one yet")
    step, state, _, _ = restored
    params = dict(state.params)
    if ema in kept:
        params |= state.ema[ema]
    elif averaged:
        profile = reconstruct(workdir, float(ema.removeprefix("width:")), step, averaged)
        params |= jax.device_put(profile, jax.tree.map(lambda x: x.sharding, averaged))
    model = params, state.mutables
    if population:
        model = take_member(model, member, mesh)
    return Restored(step, *model, mesh, None if ema == "none" else ema)


def _averaged(shapes: Any, ema: str) -> Params:
    """The groups that the average `ema` has, as shapes; none of them for "none"."""
    if not ema.startswith("width:"):
        return shapes.ema.get(ema, {})
    try:
        float(ema.removeprefix("width:"))
    except ValueError:
        raise ConfigError(f"--ema={ema} is not width:W with a number W") from None
    for name, values in shapes.ema.items():
        if name.startswith("width"):
            return values
    raise ConfigError(f"--ema={ema} needs a run with --ema.relative_width and snapshots")
