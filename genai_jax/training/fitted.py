"""Tasks that are fitted in one pass over their data instead of by gradients."""

import itertools
import pathlib
import sys
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from genai_jax.config import Config, ConfigError
from genai_jax.tasks.protocol import Task, held_out_spec
from genai_jax.training.batches import BatchPlacement
from genai_jax.training.checkpoint import CheckpointConfig, Checkpointer
from genai_jax.training.evaluation import Evaluator
from genai_jax.training.hardware import peak_of
from genai_jax.training.metrics_log import MetricsLog
from genai_jax.training.options import EvalConfig, TrainConfig
from genai_jax.training.portable import keep
from genai_jax.training.sharding import MeshConfig, batch_shardings, make_mesh, mesh_context
from genai_jax.training.step import TrainState, init_state
from genai_jax.training.wandb_board import wandb_boards
from genai_jax.training.workdir import run_record, write_record


def fit(task: Task, config: Config) -> int:
    """Fits on --train.steps batches, evaluates, and saves one checkpoint; see `Fitted`.

    A finished run is left as it is; one that was interrupted is fitted again from the start.

    Returns:
      0.

    Raises:
      ConfigError: a mistake in the flags or the data, or several processes.
    """
    if jax.process_count() > 1:
        raise ConfigError(f"--task={config.run.task} is fitted by one process")
    _check_unused(task, config)
    workdir, steps = pathlib.Path(config.run.workdir), config.train.steps
    checkpointer = Checkpointer(workdir / "checkpoints", config.checkpoint)
    if steps in checkpointer.steps():
        print(f"{workdir} has already been fitted", file=sys.stderr)
        return 0
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    with mesh_context(mesh):
        state = jax.jit(lambda key: init_state(task, key, {}))(jax.random.key(config.run.seed))
        flops = {"flops_per_step": 0, "convention": "none: the task is fitted without gradients"}
        peak = peak_of(jax.devices()[:1])
        record = run_record(task, mesh, state.params, flops, peak)
        write_record(workdir, record)
        keep(task, config, record["data"])
        log, begin = MetricsLog(workdir, 0, wandb_boards(config, 0)), time.perf_counter()
        source = task.data.train()
        try:
            params = task.fit(itertools.islice(_batches(source), steps))
            state = _fitted(state, params, steps)
            row = {"step": steps, "perf/fit_time_s": time.perf_counter() - begin}
            metrics = _evaluated(task, config, mesh, state)
            log.write(row | {f"eval/{name}": value for name, value in metrics.items()})
            log.check()
            clock = {"seconds": row["perf/fit_time_s"], "unfinished_row": None, "rare": {}}
            checkpointer.save(steps, state, source.get_state(), clock, metrics.get("loss"))
        except BaseException:
            source.close()
            log.close(failed=True)
            raise
        source.close()
        log.close()
    checkpointer.close()
    return 0


def _check_unused(task: Task, config: Config):
    """Raises `ConfigError` for a flag of the loop that means nothing where there are no steps."""
    for component, cls, names in (
        ("run", type(config.run), ("init_from", "init_map")),
        ("train", TrainConfig, ("log_every", "accumulate")),
        ("eval", EvalConfig, ("every",) if task.is_scored else ("every", "batches")),
        ("checkpoint", CheckpointConfig, ("every",)),
    ):
        for name in names:
            value = getattr(getattr(config, component), name)
            if value != getattr(cls(), name):
                flag = name if component == "run" else f"{component}.{name}"
                raise ConfigError(
                    f"--{flag}={value} means nothing to --task={config.run.task}, which is fitted "
                    f"in one pass{'' if task.is_scored else ' and has no scores'}"
                )


def _batches(source) -> Iterator:
    while True:
        yield next(source)


def _fitted(state: TrainState, params, steps: int) -> TrainState:
    """The state with the fitted parameters.

    Raises:
      ValueError: they are not shaped as those of `init`.
    """
    params = jax.tree.map(jnp.asarray, params)
    expected, got = (jax.tree.map(jnp.shape, tree) for tree in (state.params, params))
    if expected != got:
        raise ValueError(f"fit returned parameters of shapes {got}; init has {expected}")
    return state.replace(params=params, step=jnp.int32(steps))


def _evaluated(task: Task, config: Config, mesh, state: TrainState) -> dict[str, float]:
    if not (config.eval.batches and task.is_scored):
        return {}
    spec = held_out_spec(task.data)
    placement = BatchPlacement(spec, batch_shardings(spec, mesh))
    held_out = map(placement.to_devices, task.data.held_out(config.eval.batches))
    return Evaluator(task)(state.params, state.mutables, held_out, config.run.seed)
