"""How a task is executed: compiled for a mesh, as a single run or a population of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from genai_jax.config import Config, ConfigError
from genai_jax.tasks.protocol import (
    ArraySpec,
    Collects,
    Params,
    Phase,
    PyTree,
    Task,
    batch_rows,
    step_spec,
)
from genai_jax.training import compiler
from genai_jax.training.evaluation import Evaluator
from genai_jax.training.flops import flops_per_step
from genai_jax.training.optimizer import learning_rate_schedule
from genai_jax.training.phases import phases_of
from genai_jax.training.sharding import (
    LOGICAL_AXES,
    axes_of,
    batch_shardings,
    batch_shards,
    mesh_context,
    state_shardings,
)
from genai_jax.training.step import TrainState, init_state, make_step
from genai_jax.training.transfer import initial_parts
from genai_jax.training.trees import overlay
from genai_jax.training.validate import check_rules, check_spec


class Compiled(NamedTuple):
    """What stays the same while a run goes on."""

    mesh: Mesh
    phases: tuple[Phase, ...]
    shapes: TrainState  # `jax.ShapeDtypeStruct`s with shardings
    batch_shardings: dict[str, NamedSharding]
    init: Any  # base key or keys -> state
    step: Any  # (state, batch) -> (state, StepReport)


class Execution(Protocol):
    """What the training loop drives.

    Attributes:
      task: the task, or that of the first member; for its data, units, and curves.
      compiled: its programs.
      examples: in a step, of all members.
      tokens: in a step, of all members; None where there are none.
      flops: `flops_per_step` and `convention`, and perhaps `inactive_parameters`.
    """

    task: Task
    compiled: Compiled
    examples: int
    tokens: int | None
    flops: dict

    def begin(self) -> TrainState:
        """A fresh state, with what was trained elsewhere in place, in averages as well."""

    def batch_spec(self) -> Mapping[str, ArraySpec]:
        """The global batch that comes from the data."""

    def data_shardings(self) -> dict[str, NamedSharding]:
        """Where it goes."""

    def train(self, rows: Sequence[int]) -> Any:
        """The iterator of these rows, as `Data.train`."""

    def collect(self, state: TrainState, batch: PyTree) -> tuple[PyTree, Mapping[str, float]]:
        """The batch for the step made from one of the data, and what to log about it."""

    def evaluate(self, state: TrainState, batches: Callable[[], Iterator]) -> dict[str, float]:
        """Held-out metrics; `batches()` yields the held-out batches each time.

        With ``--ema.use``, also those of that average, as ``ema/...``.
        """

    def in_use(self, state: TrainState) -> tuple[Params, PyTree]:
        """Parameters and mutables of one model as sampling uses them: the average ``--ema.use``.

        Adapters are merged in. Of a population it is the first member.
        """

    def numbers(self, metrics: Mapping[str, np.ndarray]) -> dict[str, float]:
        """The metrics of a step, on the host, as single numbers."""

    def rate(self, step: int) -> np.ndarray:
        """The learning rate after `step` completed steps: a number, or one for each member."""

    def shapes_of_one(self, tree: PyTree) -> PyTree:
        """A single model's shapes out of those of the state."""


def initializer(task: Task, config: Config) -> Callable[[jax.Array], TrainState]:
    """Base key -> a fresh state; jax traces the same function only once."""
    averages, phases = config.ema.averages(), phases_of(task, config)
    return lambda key: init_state(task, key, averages, phases)


def state_shapes(
    task: Task, config: Config, mesh: Mesh, init: Callable[[jax.Array], TrainState] | None = None
) -> TrainState:
    """The train state as `jax.ShapeDtypeStruct`s that know their sharding on `mesh`.

    A caller that compiles the `initializer` afterwards passes it as `init`.
    """
    init = init or initializer(task, config)
    with mesh_context(mesh):
        shapes = jax.eval_shape(jax.jit(init), jax.eval_shape(lambda: jax.random.key(0)))
    shardings = state_shardings(shapes, task.partition_rules, mesh, task.mutable_rules)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def build(task: Task, config: Config, mesh: Mesh) -> Compiled:
    """Shapes first, then shardings, then the functions; nothing runs and nothing is allocated."""
    averages, accumulate = config.ema.averages(), config.train.accumulate
    check_spec(task)
    check_rules(task.partition_rules)
    init = initializer(task, config)
    with mesh_context(mesh):
        shapes = state_shapes(task, config, mesh, init)
        phases = phases_of(task, config)(shapes.params)
        check_rows(config, batch_rows(step_spec(task)), phases, batch_shards(mesh))
        batch_in = batch_shardings(step_spec(task), mesh)
        shardings = jax.tree.map(lambda x: x.sharding, shapes)
        split = jax.tree.leaves(shardings), list(batch_in.values())
        check_mesh_is_used(mesh, *split, task.activation_axes)
        step = make_step(
            phases, accumulate=accumulate, averages=averages, materialize=task.materialize
        )
    return jitted(config, mesh, phases, shapes, batch_in, init, step)


def jitted(config: Config, mesh: Mesh, phases, shapes, batch_in, init, step) -> Compiled:
    """The functions of a state and a step, jitted with their shardings."""
    device, platform = mesh.devices.flat[0], mesh.devices.flat[0].platform
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    step = jax.jit(
        step,
        in_shardings=(shardings, batch_in),
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
        compiler_options=compiler.options(config.compiler, platform, device.device_kind),
    )
    init = jax.jit(init, out_shardings=shardings, compiler_options=compiler.init_options(platform))
    return Compiled(mesh, phases, shapes, batch_in, init, step)


def check_mesh_is_used(mesh: Mesh, state: list, batch: list, more: tuple[str, ...] = ()):
    """Raises `ConfigError` for an axis that splits nothing: its devices would repeat work.

    state, batch: shardings; more: axes that split activations. The batch is split over the expert
    axis as well, but only experts make use of that axis.
    """
    names = lambda shardings: {n for s in shardings for part in s.spec for n in axes_of(part)}
    used = names(state) | (names(batch) - {"expert"}) | {*more}
    for axis, size in mesh.shape.items():
        if size > 1 and axis not in used:
            raise ConfigError(f"--mesh.{axis}={size} splits nothing in this task")


def check_rows(config: Config, rows: int, phases: Sequence[Phase], shards: int):
    """Raises `ConfigError` unless every microbatch divides over the devices that share it."""
    accumulate = config.train.accumulate
    flags = [f"--{n}.batch_size" for n, c in config.components.items() if hasattr(c, "batch_size")]
    batch = f"{flags[0]}={rows}" if flags else f"a batch of {rows} rows"
    for parts in {phase.repeats * accumulate for phase in phases}:
        if rows % (shards * parts):
            raise ConfigError(
                f"{batch} is not divisible by {shards} device(s) of the axes "
                f"{', '.join(LOGICAL_AXES['batch'])} x {parts} part(s) a step"
            )


def host_rate(config: Config) -> Callable[[int], np.ndarray]:
    """Completed steps -> learning rate of the next one, computed without a device."""
    rate = learning_rate_schedule(config.optimizer, config.train.steps, np)
    return lambda step: np.asarray(rate(step), np.float64)


class SingleRun:
    """One run of a task; see `Execution`."""

    def __init__(self, task: Task, config: Config, mesh: Mesh):
        self.task, self._config = task, config
        self.compiled = build(task, config, mesh)
        self.examples = batch_rows(task.data.batch_spec)
        self.tokens, self.rate = task.tokens_per_step(), host_rate(config)
        shapes = self.compiled.shapes
        self.flops = flops_per_step(task, self.compiled.phases, shapes.params, shapes.mutables)
        self._evaluator = Evaluator(task)
        if config.eval.batches:
            with mesh_context(mesh):
                self._evaluator.check(shapes.params, shapes.mutables)

    def begin(self) -> TrainState:
        state = self.compiled.init(jax.random.key(self._config.run.seed))
        shapes = self.compiled.shapes
        part = initial_parts(self.task, self._config, shapes, state)
        return with_part(state, part, shapes) if part else state

    def batch_spec(self) -> Mapping[str, ArraySpec]:
        return self.task.data.batch_spec

    def data_shardings(self) -> dict[str, NamedSharding]:
        return batch_shardings(self.task.data.batch_spec, self.compiled.mesh)

    def train(self, rows: Sequence[int]) -> Any:
        return self.task.data.train(rows)

    def collect(self, state: TrainState, batch: PyTree) -> tuple[PyTree, Mapping[str, float]]:
        if not isinstance(self.task, Collects):
            return batch, {}
        key = jax.random.fold_in(jax.random.fold_in(state.rng, state.step), COLLECT)
        params = self.task.materialize(state.params)
        collected = self.task.collect(params, state.mutables, batch, key)
        placed = jax.device_put(dict(collected.batch), self.compiled.batch_shardings)
        return placed, collected.metrics

    def evaluate(self, state: TrainState, batches: Callable[[], Iterator]) -> dict[str, float]:
        seed = evaluation_seed(self.task, self._config)
        return with_average(
            lambda params, mutables: self._evaluator(params, mutables, batches(), seed),
            state.params, state.mutables, state.ema.get(self._config.ema.use),
        )  # fmt: skip

    def in_use(self, state: TrainState) -> tuple[Params, PyTree]:
        return in_use(self.task, state.params, state.mutables, state.ema.get(self._config.ema.use))

    def numbers(self, metrics: Mapping[str, np.ndarray]) -> dict[str, float]:
        return {name: float(value) for name, value in metrics.items()}

    def shapes_of_one(self, tree: PyTree) -> PyTree:
        return tree


def with_average(
    evaluate: Callable[[PyTree, PyTree], dict[str, float]], params: PyTree, mutables: PyTree,
    average: PyTree | None,
) -> dict[str, float]:  # fmt: skip
    """The metrics of the parameters and, as ``ema/...``, of the average that will be used."""
    metrics = evaluate(params, mutables)
    if average is None:
        return metrics
    averaged = evaluate(overlay(params, average), mutables)
    return metrics | {f"ema/{name}": value for name, value in averaged.items()}


def in_use(
    task: Task, params: Params, mutables: PyTree, average: Params | None
) -> tuple[Params, PyTree]:
    """See `Execution.in_use`; `average` is None where the parameters themselves are used."""
    return task.materialize(params if average is None else overlay(params, average)), mutables


def evaluation_seed(task: Task, config: Config) -> int:
    """The seed of what is random in the held-out metrics during training."""
    return config.run.seed if task.evaluation_seed is None else task.evaluation_seed


COLLECT = 0xC011EC7  # folded into a step's key for what is collected before it


def with_part(state: TrainState, part: PyTree, shapes: TrainState) -> TrainState:
    """`state` with `part` ({"params": ..., "mutables": ...}) in place, in averages as well.

    What is put in place is copied: the step may donate it, so it cannot be anybody else's memory.
    """

    def place(part: PyTree, whole: PyTree, where: PyTree) -> PyTree:
        mine = _common(part, whole)
        shardings = jax.tree.map(lambda x: x.sharding, _common(where, mine))
        copy = jax.jit(lambda x: jax.tree.map(jnp.copy, x), out_shardings=shardings)
        return overlay(whole, copy(mine))

    params, mutables = part.get("params", {}), part.get("mutables", {})
    return state.replace(
        params=place(params, state.params, shapes.params),
        mutables=place(mutables, state.mutables, shapes.mutables) if mutables else state.mutables,
        ema={name: place(params, x, shapes.ema[name]) for name, x in state.ema.items()},
    )


def _common(part: PyTree, whole: PyTree) -> PyTree:
    """What of `part` is in `whole` as well, in nested dictionaries."""
    if not (isinstance(part, dict) and isinstance(whole, dict)):
        return part
    return {name: _common(value, whole[name]) for name, value in part.items() if name in whole}
