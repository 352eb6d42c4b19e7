"""The training step for parameters and a loss of one's own, without a task."""

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from genai_jax.config import ConfigError
from genai_jax.tasks.protocol import ArraySpec, LossOutput, Params, Phase, StepInfo
from genai_jax.training.compiler import CompilerConfig
from genai_jax.training.execution import jitted
from genai_jax.training.sharding import (
    MESH_AXES,
    MeshConfig,
    batch_shardings,
    batch_shards,
    make_mesh,
    mesh_context,
    state_shardings,
)
from genai_jax.training.step import TrainState, init_state
from genai_jax.training.step import make_step as make_phase_step

Loss = Callable[[Params, Mapping[str, jax.Array], jax.Array], Any]
Step = Callable[[TrainState, Mapping[str, Any]], tuple[TrainState, dict[str, jax.Array]]]
REPLICATED = (("", (...,)),)


def make_step(
    loss: Loss,
    params: Params | Callable[[jax.Array], Params],
    optimizer: optax.GradientTransformation,
    *,
    rules: Sequence[tuple[str, tuple]] = REPLICATED,
    mesh: Mapping[str, int] | None = None,
    accumulate: int = 1,
    seed: int = 0,
) -> tuple[TrainState, Step]:
    """The step that trains every family, for a loss of your own.

    Args:
      loss: (params, batch, key) -> a scalar, or (a scalar, a dictionary of scalars to report). The
        key is different in every step.
      params: nested dictionaries of float32 arrays, or a function key -> such, which is traced, so
        that no device ever holds a whole copy of what is sharded.
      optimizer: of all parameters.
      rules: ordered (regular expression of parameter paths, logical axes), as in
        `Task.partition_rules`: ("kernel$", ("embed", "mlp")). All are replicated by default.
      mesh: sizes of mesh axes, {"fsdp": 4, "tensor": 2}; the remaining devices share the batch.
      accumulate: microbatches per step, one in memory at a time.
      seed: of the parameters, if a function makes them, and of the keys.

    Returns:
      The state (`state.params`, `state.step`), and the compiled step: (state, batch) -> (state,
      metrics). A batch is a dictionary of arrays [rows, ...], whose rows the devices share. The
      step takes the memory of the state that it is given. Metrics are "loss", "grad_norm", and what
      the loss reports, on the devices.

    Raises:
      ConfigError: a mesh that does not fit the devices, or sizes that it does not divide.
    """
    unknown = set(mesh or {}) - set(MESH_AXES)
    if unknown:
        raise ConfigError(f"mesh: {unknown.pop()!r} is not one of {', '.join(MESH_AXES)}")
    grid = make_mesh(MeshConfig(**(mesh or {})))
    make_params = params if callable(params) else None
    arrays = {} if callable(params) else jax.tree.map(jnp.asarray, dict(params))

    def begin(key: jax.Array, arrays: Params) -> TrainState:
        init = make_params or (lambda key: arrays)
        task = types.SimpleNamespace(init=lambda key: (init(key), {}))
        return init_state(task, key, {}, phases_of)

    def phases_of(params: Params) -> tuple[Phase, ...]:
        return (Phase("own", tuple(params), _loss_fn(loss), optimizer),)

    key = jax.random.key(seed)
    with mesh_context(grid):
        shapes = jax.eval_shape(begin, key, arrays)
        shardings = state_shardings(shapes, rules, grid)
        state = jax.jit(begin, out_shardings=shardings)(key, arrays)
    shapes = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
    return state, _Step(grid, phases_of(shapes.params), shapes, accumulate)


class _Step:
    """The step, compiled for each shape of batches."""

    def __init__(self, mesh, phases: tuple[Phase, ...], shapes: TrainState, accumulate: int):
        self._mesh, self._phases, self._shapes = mesh, phases, shapes
        self._step = make_phase_step(phases, accumulate=accumulate)
        self._accumulate, self._compiled = accumulate, {}

    def __call__(self, state: TrainState, batch: Mapping[str, Any]):
        batch = dict(batch)
        spec = {name: _spec(name, x) for name, x in batch.items()}
        kind = tuple(sorted((name, x.shape, str(x.dtype)) for name, x in spec.items()))
        if kind not in self._compiled:
            self._compiled[kind] = self._compile(spec)
        with mesh_context(self._mesh):
            program = self._compiled[kind]
            state, report = program.step(state, jax.device_put(batch, program.batch_shardings))
        return state, report.metrics

    def _compile(self, spec: Mapping[str, ArraySpec]):
        rows = {x.shape[0] for x in spec.values()}
        parts = batch_shards(self._mesh) * self._accumulate
        if len(rows) != 1 or min(rows) % parts:
            raise ConfigError(
                f"a batch has {' and '.join(map(str, sorted(rows)))} rows; all its arrays need the "
                f"same number, divisible by {batch_shards(self._mesh)} device(s) x "
                f"{self._accumulate} microbatch(es)"
            )
        shardings = batch_shardings(spec, self._mesh)
        config = types.SimpleNamespace(compiler=CompilerConfig())
        return jitted(
            config, self._mesh, self._phases, self._shapes, shardings, lambda key: None, self._step
        )


def _spec(name: str, x: Any) -> ArraySpec:
    shape = jnp.shape(x)
    if not shape:
        raise ConfigError(f"batch entry {name} is a single number; its first axis has to be rows")
    return ArraySpec(shape, jnp.result_type(x), ("batch",) + (None,) * (len(shape) - 1))


def _loss_fn(loss: Loss) -> Callable[..., LossOutput]:
    def of_phase(params, mutables, batch, info: StepInfo) -> LossOutput:
        result = loss(params, batch, info.rng)
        value, metrics = result if isinstance(result, tuple) else (result, {})
        return LossOutput(value, dict(metrics), mutables)

    return of_phase
