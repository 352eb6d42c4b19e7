"""Restoring a trained model from a workdir, for sampling and evaluation."""

import math
import pathlib
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from genai_jax.config import Config, ConfigError
from genai_jax.requests import BEST
from genai_jax.tasks.protocol import Params, PyTree, Task, batch_rows
from genai_jax.training.checkpoint import Checkpointer
from genai_jax.training.ema_profiles import reconstruct
from genai_jax.training.execution import state_shapes
from genai_jax.training.phases import phases_of
from genai_jax.training.population import member_config, stacked_shapes, take_member
from genai_jax.training.sharding import MeshConfig, batch_shards, make_mesh, mesh_context
from genai_jax.training.step import frozen_paths
from genai_jax.training.trees import leaf_paths, overlay
from genai_jax.training.workdir import read_record


class Restored(NamedTuple):
    """A model on a mesh of this machine's devices."""

    step: int
    params: Params
    mutables: PyTree
    mesh: Mesh
    ema: str | None  # the average that `params` are; None for the parameters themselves


def _mesh_here(config: Config, rows: int) -> Mesh:
    """The mesh of the run or, if it does not fit, as many devices as share the batch evenly."""
    try:
        mesh = make_mesh(config.mesh)
        if rows % batch_shards(mesh) == 0:
            return mesh
    except ConfigError:
        pass
    count = math.gcd(len(jax.devices()), rows)
    if jax.process_count() > 1 and count < len(jax.devices()):
        raise ConfigError(
            f"a batch of {rows} rows is not divisible by the {len(jax.devices())} devices of "
            f"{jax.process_count()} processes: use one process"
        )
    return make_mesh(MeshConfig(), jax.devices()[:count])


def restore_model(
    task: Task,
    config: Config,
    *,
    step: int | str | None = None,
    ema: str | None = None,
    member: int = 0,
) -> Restored:
    """Restores the parameters of a run, or an average of them, onto this machine's devices.

    Args:
      task: of the run.
      config: of the run.
      step: of the checkpoint, or `BEST` for the one with the lowest held-out loss, that of
        ``--ema.use`` if it is set; the newest if None.
      ema: an average that the run kept; "width:W" for the power-function average of that relative
        width, reconstructed from snapshots; "none" for the parameters; None for ``--ema.use``.
      member: index within a population, from 0.

    Raises:
      ConfigError: there is no such checkpoint, average, or member; or the data differs from what
        the run was trained on.
    """
    workdir = pathlib.Path(config.run.workdir)
    task.data.check(read_record(workdir).get("data", {}))
    ema = ema or config.ema.use or "none"
    kept = config.ema.averages()
    if ema != "none" and ema not in kept and not ema.startswith("width:"):
        raise ConfigError(
            f"--ema={ema} is not an average of this run; it kept: {', '.join(kept) or 'none'}"
        )
    mesh = _mesh_here(member_config(config, member), batch_rows(task.data.batch_spec))
    if config.population.size > 1:
        with mesh_context(mesh):
            size, first = config.population.size, member_config(config, 0)
            shapes = stacked_shapes(task, first, size, mesh)
    else:
        shapes = state_shapes(task, config, mesh)
    averaged = _averaged(shapes, ema)  # parameters that are not trained have no average
    rest = frozenset(leaf_paths(shapes.params)) - frozenset(leaf_paths(averaged))
    average = [f"ema/{ema}"] if ema in kept else []
    checkpointer = Checkpointer(
        workdir / "checkpoints", config.checkpoint, read_only=True,
        frozen=frozen_paths(phases_of(task, config)(shapes.params), shapes.params),
    )  # fmt: skip
    wanted = ("mutables", *(f"params/{path}" for path in rest), *average)
    if step == BEST:
        step = checkpointer.best_step()
        if step is None and checkpointer.steps():
            raise ConfigError(
                f"--checkpoint_step={BEST}: no checkpoint in --workdir={workdir} was evaluated "
                "when it was saved (--eval.every, --eval.batches)"
            )
    restored = checkpointer.restore(shapes, step, wanted)
    checkpointer.close()
    if restored is None:
        raise ConfigError(f"no checkpoint in --workdir={workdir}: the run has not saved one yet")
    step, state, _, _ = restored
    params = state.params
    if ema in kept:
        params = overlay(params, state.ema[ema])
    elif averaged:
        profile = reconstruct(workdir, float(ema.removeprefix("width:")), step, averaged)
        where = jax.tree.map(lambda x: x.sharding, averaged)
        params = overlay(params, jax.device_put(profile, where))
    model = params, state.mutables
    if config.population.size > 1:
        model = take_member(model, member, mesh)
    return Restored(step, *model, mesh, None if ema == "none" else ema)


def _averaged(shapes: Any, ema: str) -> Params:
    """The parameters that the average `ema` covers, as shapes; {} for "none"."""
    if not ema.startswith("width:"):
        return shapes.ema.get(ema, {})
    try:
        float(ema.removeprefix("width:"))
    except ValueError:
        raise ConfigError(f"--ema={ema} is not width:W with a number W") from None
    for name, values in shapes.ema.items():
        if name.startswith("width"):
            return values
    raise ConfigError(f"--ema={ema} needs a run with --ema.relative_width and --ema.snapshot_every")
