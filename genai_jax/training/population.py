"""Several runs of one task as one: a single compiled step trains all of them side by side.

Members differ in seed or learning rate. The state is that of a single run with a leading axis of
members on every array, and the step is that of a single run under `jax.vmap`. The data axis of the
mesh splits the members, each of which is whole on its device, so that devices do not communicate.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from genai_jax.config import Config, ConfigError, field
from genai_jax.tasks.protocol import ArraySpec, Params, PyTree, Task, batch_rows
from genai_jax.training.ema import Average
from genai_jax.training.evaluation import Evaluator
from genai_jax.training.execution import (
    Compiled,
    check_rows,
    evaluation_seed,
    host_rate,
    in_use,
    jitted,
    with_average,
    with_part,
)
from genai_jax.training.flops import flops_per_step
from genai_jax.training.phases import phases_of
from genai_jax.training.sharding import LOGICAL_AXES, mesh_context
from genai_jax.training.step import TrainState, init_state, make_step
from genai_jax.training.transfer import initial_parts

AXIS = "data"  # the mesh axis that splits the members


@dataclasses.dataclass(frozen=True)
class PopulationConfig:
    size: int = field(
        1,
        "Runs trained side by side in one compiled step; run k has seed --seed + k.",
        minimum=1,
        maximum=65_536,
    )
    learning_rates: str = field(
        "",
        "Comma-separated learning rates, one per run; the runs then differ in these, not in seed.",
    )

    def __post_init__(self):
        if not self.learning_rates:
            return
        try:
            rates = self.rates()
        except ValueError:
            raise ValueError(
                f"--population.learning_rates={self.learning_rates} is not a list of numbers"
            ) from None
        if len(rates) != self.size:
            raise ValueError(
                f"--population.learning_rates={self.learning_rates} has {len(rates)} rate(s) for "
                f"--population.size={self.size}"
            )
        if not all(math.isfinite(rate) and rate >= 0 for rate in rates):
            raise ValueError(
                f"--population.learning_rates={self.learning_rates}: rates must be finite and at "
                "least 0"
            )

    def rates(self) -> list[float]:
        """The learning rates; empty if members differ in seed."""
        return [float(text) for text in self.learning_rates.split(",") if text]


def member_config(config: Config, member: int) -> Config:
    """The configuration of a member as a run of its own.

    Raises:
      ConfigError: there is no such member.
    """
    population = config.population
    if not 0 <= member < population.size:
        raise ConfigError(f"--member={member} is not one of 0 to {population.size - 1}")
    if population.size == 1:
        return config
    rates = population.rates()
    single = config.replace("population", size=1, learning_rates="")
    if rates:
        return single.replace("optimizer", learning_rate=rates[member])
    return single.replace("run", seed=config.run.seed + member)


class Population:
    """Several runs side by side; see `genai_jax.training.execution.Execution`.

    Members that differ in learning rate share each batch. Otherwise each takes the batches of its
    own seed, stacked as ``[members, rows, ...]``, so that "rows" of the global batch are members.

    Args:
      task: of the population's configuration; its class makes the tasks of the members.
      config: of the population.
      mesh: its data axis splits the members.
    """

    def __init__(self, task: Task, config: Config, mesh: Mesh):
        self.size, self._mesh = config.population.size, mesh
        self.configs = [member_config(config, k) for k in range(self.size)]
        self._task_class = type(task)
        self.shared_batch = bool(config.population.learning_rates)
        self.members = [
            self._task_class(c) for c in self.configs[: 1 if self.shared_batch else None]
        ]
        first = self.task = self.members[0]
        if hasattr(first, "collect"):
            raise ConfigError(
                f"--population.size={self.size}: --task={config.run.task} collects batches from "
                "its model, and such a task needs --population.size=1"
            )
        self.compiled = self._build(config)
        one = self.shapes_of_one(self.compiled.shapes)
        flops = flops_per_step(first, self.compiled.phases, one.params, one.mutables)
        self.flops = flops | {"flops_per_step": flops["flops_per_step"] * self.size}
        self.examples = batch_rows(first.data.batch_spec) * self.size
        tokens = first.tokens_per_step()
        self.tokens = None if tokens is None else tokens * self.size
        rates = [host_rate(c) for c in self.configs]
        self.rate = lambda step: np.stack([rate(step) for rate in rates])
        self._evaluator = Evaluator(first)
        self._reported_diverged: set[int] = set()

    def begin(self) -> TrainState:
        keys = jnp.stack([jax.random.key(c.run.seed) for c in self.configs])
        state, shapes = self.compiled.init(keys), self.compiled.shapes
        one = jax.tree.map(lambda x: self._shape_on_all(x.shape[1:], x.dtype), shapes)
        member = take_member(state, 0, self._mesh)
        part = initial_parts(self.task, self.configs[0], one, member)
        if not part:
            return state
        stacked = jax.tree.map(lambda x: jnp.broadcast_to(x, (self.size, *jnp.shape(x))), part)
        return with_part(state, stacked, shapes)

    def _shape_on_all(self, shape, dtype) -> jax.ShapeDtypeStruct:
        where = NamedSharding(self._mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    # Programs.

    def _build(self, config: Config) -> Compiled:
        mesh, first = self._mesh, self.task
        averages, accumulate = config.ema.averages(), config.train.accumulate
        self._check_mesh()
        with mesh_context(mesh):
            shapes = stacked_shapes(first, self.configs[0], self.size, mesh)
            phases = phases_of(first, self.configs[0])(self.shapes_of_one(shapes.params))
            check_rows(config, batch_rows(first.data.batch_spec), phases, 1)
            spec = PartitionSpec() if self.shared_batch else PartitionSpec(AXIS)
            batch_in = {name: NamedSharding(mesh, spec) for name in first.data.batch_spec}
            fresh = lambda key: init_state(first, key, averages, phases_of(first, self.configs[0]))
            init = self._over_members(fresh, 1)
            step = self._step(accumulate, averages)
        return jitted(config, mesh, phases, shapes, batch_in, init, step)

    def _step(self, accumulate: int, averages: dict[str, Average]) -> Callable:
        """(state, batch) -> (state, report of [members] arrays)."""
        config = self.configs[0]

        def update(task, config, state, batch):
            phases = phases_of(task, config)(state.params)
            step = make_step(
                phases, accumulate=accumulate, averages=averages, materialize=task.materialize
            )
            return step(state, batch)

        def own_rate(state, rate, batch):
            changed = config.replace("optimizer", learning_rate=rate)
            return update(self._task_class(changed), changed, state, batch)

        if not self.shared_batch:
            return self._over_members(lambda *x: update(self.task, config, *x), 2)
        rates = jnp.array([c.optimizer.learning_rate for c in self.configs], jnp.float32)
        run = self._over_members(own_rate, 2, shared=1)
        return lambda state, batch: run(state, rates, batch)

    def _over_members(self, function: Callable, split: int, shared: int = 0) -> Callable:
        """Maps `function` over members: `split` arguments have their axis, `shared` ones do not."""

        def part(*arguments):
            # No logical axis maps to an axis of the mesh in here: members are whole.
            with nn.logical_axis_rules([(name, None) for name in LOGICAL_AXES]):
                return jax.vmap(function, in_axes=(0,) * split + (None,) * shared)(*arguments)

        along, whole = PartitionSpec(AXIS), PartitionSpec()
        return jax.shard_map(
            part,
            mesh=self._mesh,
            in_specs=(along,) * split + (whole,) * shared,
            out_specs=along,
            axis_names={AXIS},  # the others, of size 1, stay automatic: kernels need to see them
            check_vma=False,
        )

    def _check_mesh(self):
        """Raises `ConfigError` for a mesh that splits a member, or the members unevenly."""
        for axis, size in self._mesh.shape.items():
            if size > 1 and axis != AXIS:
                raise ConfigError(
                    f"--mesh.{axis}={size}: a member of a population is whole on its device; only "
                    f"--mesh.{AXIS} may be above 1"
                )
        if self.size % self._mesh.shape[AXIS]:
            raise ConfigError(
                f"--population.size={self.size} is not divisible by "
                f"--mesh.{AXIS}={self._mesh.shape[AXIS]}"
            )

    def shapes_of_one(self, tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tree)

    # Data.

    def batch_spec(self) -> Mapping[str, ArraySpec]:
        spec = self.task.data.batch_spec
        if self.shared_batch:
            return spec
        return {
            name: x._replace(shape=(self.size, *x.shape), axes=(None, *x.axes))
            for name, x in spec.items()
        }

    def data_shardings(self) -> dict[str, NamedSharding]:
        return self.compiled.batch_shardings

    def train(self, rows: Sequence[int]) -> Any:
        if self.shared_batch:
            return self.task.data.train(rows)
        return _StackedBatches({k: self.members[k].data.train() for k in rows})

    def collect(self, state: TrainState, batch: PyTree) -> tuple[PyTree, Mapping[str, float]]:
        return batch, {}

    # Numbers.

    def evaluate(self, state: TrainState, batches: Callable[[], Iterator]) -> dict[str, float]:
        """The held-out metrics of all members, formatted by `numbers`."""
        trained = state.params, state.mutables, state.ema.get(self.configs[0].ema.use)
        metrics = []
        for k, config in enumerate(self.configs):
            seed = evaluation_seed(self.task, config)
            evaluate = lambda *model, seed=seed: self._evaluator(*model, batches(), seed)
            metrics.append(with_average(evaluate, *take_member(trained, k, self._mesh)))
        return self.numbers({n: np.array([m[n] for m in metrics]) for n in metrics[0]})

    def in_use(self, state: TrainState) -> tuple[Params, PyTree]:
        trained = state.params, state.mutables, state.ema.get(self.configs[0].ema.use)
        return in_use(self.task, *take_member(trained, 0, self._mesh))

    def numbers(self, metrics: Mapping[str, np.ndarray]) -> dict[str, float]:
        """The mean of each metric over the members, and ``metric/k`` for member k.

        A member that has diverged is left out, with one warning; if all have, none is left out.
        """
        bad = [~np.isfinite(x) for x in metrics.values() if x.dtype.kind == "f"]
        diverged = {int(k) for k in np.flatnonzero(np.any(bad, axis=0))} if bad else set()
        if len(diverged) == self.size:
            diverged = set()
        for k in sorted(diverged - self._reported_diverged):
            print(f"warning: member {k} has diverged; the others continue", file=sys.stderr)
        self._reported_diverged |= diverged
        alive = [k for k in range(self.size) if k not in diverged]
        means = {name: float(np.mean(x[alive])) for name, x in metrics.items()}
        return means | {f"{name}/{k}": float(x[k]) for name, x in metrics.items() for k in alive}


def stacked_shapes(task: Task, config: Config, size: int, mesh: Mesh) -> TrainState:
    """The state of `size` members as `jax.ShapeDtypeStruct`s.

    The data axis of the mesh splits the members if it divides their number.
    """
    averages, phases = config.ema.averages(), phases_of(task, config)
    one = jax.eval_shape(lambda: init_state(task, jax.random.key(0), averages, phases))
    splits = size % mesh.shape[AXIS] == 0
    where = NamedSharding(mesh, PartitionSpec(AXIS) if splits else PartitionSpec())
    stacked = lambda x: jax.ShapeDtypeStruct((size, *x.shape), x.dtype, sharding=where)
    return jax.tree.map(stacked, one)


def take_member(tree: PyTree, member: int, mesh: Mesh) -> PyTree:
    """The arrays of one member, replicated on the mesh."""
    where = NamedSharding(mesh, PartitionSpec())
    take = jax.jit(lambda tree, k: jax.tree.map(lambda x: x[k], tree), out_shardings=where)
    return take(tree, member)


class _StackedBatches:
    """The batches of several members, stacked; an iterator as `Data.train` returns it."""

    def __init__(self, sources: dict[int, Any]):
        self._sources = sources

    def __next__(self) -> dict[str, np.ndarray]:
        batches = [next(source) for source in self._sources.values()]
        return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}

    def get_state(self) -> dict:
        return {"members": {str(k): source.get_state() for k, source in self._sources.items()}}

    def set_state(self, state: dict):
        for k, source in self._sources.items():
            source.set_state(state["members"][str(k)])

    def close(self):
        for source in self._sources.values():
            source.close()
