"""Several runs of one task as one: a compiled step trains all of them side by side.

Members differ in their seed or in their learning rate. The state is a run's with the members' axis
in front of every array, and the step is a run's under `jax.vmap`. Along the mesh's data axis it is
the members that are split, each whole on its device, so that no device talks to another.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from genai_jax.config import Config, ConfigError, field
from genai_jax.training.ema import Average
from genai_jax.training.phase import Params, Phase, PyTree, Task
from genai_jax.training.sharding import LOGICAL_AXES
from genai_jax.training.step import TrainState, init_state, make_step

AXIS = "data"  # the mesh axis that splits the members


@dataclasses.dataclass(frozen=True)
class PopulationConfig:
    size: int = field(
        1, "runs trained side by side in one compiled step, with seeds from --seed on", minimum=1
    )
    learning_rates: str = field(
        "", "one for each of them, comma-separated: they then differ in these, not in their seed"
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
                f"--population.learning_rates={self.learning_rates}: rates are finite, at least 0"
            )

    def rates(self) -> list[float]:
        """The learning rates, empty where members differ in their seed."""
        return [float(text) for text in self.learning_rates.split(",") if text]


def member_config(config: Config, member: int) -> Config:
    """The configuration of the run that a member is.

    Raises:
      ConfigError: there is no such member.
    """
    population = config.population
    if not 0 <= member < population.size:
        raise ConfigError(f"--member={member} is not one of 0 to {population.size - 1}")
    rates = population.rates()
    alone = config.replace("population", size=1, learning_rates="")
    if rates:
        return alone.replace("optimizer", learning_rate=rates[member])
    return alone.replace("run", seed=config.run.seed + member)


class Population:
    """What the training loop asks of a `Task`, for all members at once.

    Rows of its batches are members: with learning rates all take the same batch, else each takes
    the batches of its own seed, stacked as ``[members, rows, ...]``.

    Args:
      task: makes a task of a member's configuration.
      config: of the population.
    """

    def __init__(self, task: Callable[[Config], Task], config: Config):
        self.size = config.population.size
        self.configs = [member_config(config, k) for k in range(self.size)]
        self._make = task
        self.shared_batch = bool(config.population.learning_rates)
        self.members = [task(c) for c in self.configs[: 1 if self.shared_batch else None]]
        first = self.first = self.members[0]
        self.partition_rules, self.loss_unit, self.curves = (
            first.partition_rules, first.loss_unit, first.curves
        )  # fmt: skip
        self.batch_axes, self.activation_axes = first.batch_axes, first.activation_axes
        self.data_record = first.data_record
        self.evaluation_batches = first.evaluation_batches  # the same whatever the seed
        self._reported_dead: set[int] = set()

    # The state

    def keys(self) -> jax.Array:
        """The base keys [members] that the members' runs would begin with."""
        return jnp.stack([jax.random.key(c.run.seed) for c in self.configs])

    def init(self, averages: dict[str, Average], mesh: Mesh) -> Callable[[jax.Array], TrainState]:
        """keys [members] -> fresh states, to be jitted."""
        return self._over_members(lambda key: init_state(self.first, key, averages), mesh, 1)

    def state_shapes(self, averages: dict[str, Average], mesh: Mesh) -> TrainState:
        """`jax.ShapeDtypeStruct`s of the state; members over the mesh's data axis if it divides."""
        one = jax.eval_shape(lambda: init_state(self.first, jax.random.key(0), averages))
        splits = self.size % mesh.shape[AXIS] == 0
        where = NamedSharding(mesh, PartitionSpec(AXIS) if splits else PartitionSpec())
        stacked = lambda x: jax.ShapeDtypeStruct((self.size, *x.shape), x.dtype, sharding=where)
        return jax.tree.map(stacked, one)

    def phases(self, params: Params) -> tuple[Phase, ...]:
        """Those of a member, for parameters [members, ...] or their shapes."""
        return self.first.phases(self.shapes_of_one(params))

    def shapes_of_one(self, tree: PyTree) -> PyTree:
        """A member's shapes out of those of all."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tree)

    def step(self, accumulate: int, averages: dict[str, Average], mesh: Mesh) -> Callable:
        """(state, batch) -> (state, metrics [members]), to be jitted."""
        config = self.configs[0]

        def update(task, state, batch):
            phases = task.phases(state.params)
            return make_step(phases, accumulate=accumulate, averages=averages)(state, batch)

        def own_rate(state, rate, batch):
            task = self._make(config.replace("optimizer", learning_rate=rate))
            return update(task, state, batch)

        if not self.shared_batch:
            return self._over_members(lambda *x: update(self.first, *x), mesh, 2)
        rates = jnp.array([c.optimizer.learning_rate for c in self.configs], jnp.float32)
        run = self._over_members(own_rate, mesh, 2, shared=1)
        return lambda state, batch: run(state, rates, batch)

    def _over_members(self, function: Callable, mesh: Mesh, split: int, shared: int = 0):
        """`function` of a member, for all: `split` arguments with their axis, `shared` without."""

        def part(*arguments):
            # Inside, no logical axis means an axis of the mesh: a member is whole.
            with nn.logical_axis_rules([(name, None) for name in LOGICAL_AXES]):
                return jax.vmap(function, in_axes=(0,) * split + (None,) * shared)(*arguments)

        along, whole = PartitionSpec(AXIS), PartitionSpec()
        return jax.shard_map(
            part,
            mesh=mesh,
            in_specs=(along,) * split + (whole,) * shared,
            out_specs=along,
            axis_names={AXIS},  # the others, all of size 1, stay free: kernels need to see them
            check_vma=False,
        )

    def check_mesh(self, mesh: Mesh):
        """Raises `ConfigError` for a mesh that does not split members evenly, or splits them up."""
        for axis, size in mesh.shape.items():
            if size > 1 and axis != AXIS:
                raise ConfigError(
                    f"--mesh.{axis}={size}: a member of a population is whole on its device; "
                    f"allowed: --mesh.{AXIS}"
                )
        if self.size % mesh.shape[AXIS]:
            raise ConfigError(
                f"--population.size={self.size} is not divisible by "
                f"--mesh.{AXIS}={mesh.shape[AXIS]}"
            )

    # The data

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        shapes = self.first.batch_shapes()
        if self.shared_batch:
            return shapes
        stacked = lambda x: jax.ShapeDtypeStruct((self.size, *x.shape), x.dtype)
        return {name: stacked(x) for name, x in shapes.items()}

    def batch_shardings(self, mesh: Mesh) -> dict[str, NamedSharding]:
        spec = PartitionSpec() if self.shared_batch else PartitionSpec(AXIS)
        return {name: NamedSharding(mesh, spec) for name in self.first.batch_shapes()}

    def train_batches(self, rows: Sequence[int] | None = None) -> Any:
        if self.shared_batch:
            return self.first.train_batches(rows)
        members = range(self.size) if rows is None else rows
        return _StackedBatches({k: self.members[k].train_batches() for k in members})

    def pretrained(self) -> dict[str, Params]:
        every = lambda x: np.broadcast_to(x, (self.size, *np.shape(x)))
        return jax.tree.map(every, self.first.pretrained())

    # Its numbers

    def tokens_per_step(self) -> int | None:
        tokens = self.first.tokens_per_step()
        return None if tokens is None else tokens * self.size

    def flops_per_step(self) -> dict:
        found = self.first.flops_per_step()
        return found | {"flops_per_step": found["flops_per_step"] * self.size}

    def evaluate(
        self, params: Params, mutables: PyTree, batches: Callable[[], Iterator], mesh: Mesh
    ) -> dict:
        """The scores of all members, as `joined`; `batches` gives the held-out ones each time."""
        scores = [
            self.first.evaluate(*take_member((params, mutables), k, mesh), batches(), c.run.seed)
            for k, c in enumerate(self.configs)
        ]
        return self.joined({n: np.array([s[n] for s in scores]) for n in scores[0]})

    def joined(self, metrics: dict[str, np.ndarray]) -> dict[str, float]:
        """Each metric's mean over the members, and ``metric/k`` of member k.

        A member that has diverged is left out, and named once; if all have, nothing is left out.
        """
        bad = [~np.isfinite(x) for x in metrics.values() if x.dtype.kind == "f"]
        dead = {int(k) for k in np.flatnonzero(np.any(bad, axis=0))} if bad else set()
        if len(dead) == self.size:
            dead = set()
        for k in sorted(dead - self._reported_dead):
            print(f"warning: member {k} has diverged; the others go on", file=sys.stderr)
        self._reported_dead |= dead
        alive = [k for k in range(self.size) if k not in dead]
        means = {name: float(np.mean(x[alive])) for name, x in metrics.items()}
        return means | {f"{name}/{k}": float(x[k]) for name, x in metrics.items() for k in alive}


def take_member(tree: PyTree, member: int, mesh: Mesh) -> PyTree:
    """One member's arrays, whole on every device of the mesh."""
    where = NamedSharding(mesh, PartitionSpec())
    take = jax.jit(lambda tree, k: jax.tree.map(lambda x: x[k], tree), out_shardings=where)
    return take(tree, member)


class _StackedBatches:
    """The batches of several members' iterators, stacked; see `Task.train_batches`."""

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
