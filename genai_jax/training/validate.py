"""Mistakes in a task are named before the first step, by tracing what it does."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from genai_jax.config import ConfigError
from genai_jax.tasks.protocol import ArraySpec, LossOutput, Mean, Phase, Rows, Task
from genai_jax.training.sharding import LOGICAL_AXES


def check_phases(phases: Any) -> tuple[Phase, ...]:
    """The phases, if that is what they are.

    Raises:
      ConfigError: anything else, two phases of one name, or counts below 1.
    """
    if not isinstance(phases, tuple) or not all(isinstance(p, Phase) for p in phases):
        raise ConfigError(f"phases() returned {_kind(phases)}; it has to be a tuple of Phase")
    names = [phase.name for phase in phases]
    for phase in phases:
        where = f"phase {phase.name}"
        if names.count(phase.name) > 1:
            raise ConfigError(f"{where} is there {names.count(phase.name)} times; names are unique")
        if not isinstance(phase.trains, tuple):
            raise ConfigError(
                f"{where} trains {phase.trains!r}; it has to be a tuple of paths, as in "
                f"({phase.trains!r},)"
            )
        for name in ("every", "repeats", "epochs"):
            if getattr(phase, name) < 1:
                raise ConfigError(f"{where} has {name}={getattr(phase, name)}; at least 1")
        if phase.slot not in names:
            raise ConfigError(
                f"{where} uses the optimizer of {phase.optimizer_of!r}, which is not one of the "
                f"phases {', '.join(names)}"
            )
    return phases


def check_loss(phase: Phase, output: Any, mutables: Any):
    """Raises `ConfigError` for what the loss of a phase may not return; arrays may be traced."""
    where = f"the loss of phase {phase.name}"
    if not isinstance(output, LossOutput):
        raise ConfigError(f"{where} returned {_kind(output)}; it has to be a LossOutput")
    numbers = {"loss": output.loss, **output.metrics}
    for name, value in numbers.items():
        if jnp.shape(value) != ():
            raise ConfigError(
                f"{where}: {name} has shape {jnp.shape(value)}; it has to be a scalar"
            )
    before, after = (jax.tree.structure(tree) for tree in (mutables, output.mutables))
    if before != after:
        raise ConfigError(f"{where} returned mutables {after}; they were {before}")


def check_example_metrics(metrics: Any, rows: int):
    """Raises `ConfigError` for what `example_metrics` may not return; arrays may be traced."""
    if not isinstance(metrics, Mapping):
        raise ConfigError(f"example_metrics returned {_kind(metrics)}; it has to be a dictionary")
    for name, value in metrics.items():
        if not isinstance(value, Mean | Rows):
            raise ConfigError(
                f"example_metrics: {name} is {_kind(value)}; it has to be a Mean or Rows"
            )
        for part, array in value._asdict().items():
            if part != "limit" and jnp.shape(array)[:1] != (rows,):
                raise ConfigError(
                    f"example_metrics: {name}.{part} has shape {jnp.shape(array)}; its first "
                    f"dimension has to be the {rows} rows of the batch"
                )


def check_batch(batch: Mapping[str, Any], spec: Mapping[str, ArraySpec], rows: int):
    """Raises `ConfigError` for host arrays that are not the rows of a batch of this `spec`."""
    if set(batch) != set(spec):
        raise ConfigError(
            f"a batch has the entries {', '.join(sorted(batch))}; batch_spec has "
            f"{', '.join(sorted(spec))}"
        )
    for name, array in batch.items():
        expected = (rows, *spec[name].shape[1:])
        if jnp.shape(array) != expected:
            raise ConfigError(
                f"batch entry {name} has shape {jnp.shape(array)}; batch_spec asks for {expected}"
            )


def check_rules(rules: Sequence[tuple[str, tuple]]):
    """Raises `ConfigError` for a logical axis that looks like a misspelled one."""
    for pattern, axes in rules:
        for axis in axes:
            if not isinstance(axis, str) or axis in LOGICAL_AXES:
                continue
            near = difflib.get_close_matches(axis, LOGICAL_AXES, n=1, cutoff=0.8)
            if near:
                raise ConfigError(
                    f"partition rule {pattern!r}: {axis!r} is not a logical axis that is ever "
                    f"split; did you mean {near[0]!r}?"
                )


def check_spec(task: Task):
    """Raises `ConfigError` for data without a `batch_spec`."""
    spec = getattr(task.data, "batch_spec", None)
    if not spec or not all(isinstance(x, ArraySpec) for x in spec.values()):
        raise ConfigError(
            f"data.batch_spec of {type(task).__name__} is {spec!r}; it has to map the entries of a "
            "batch to ArraySpec(shape, dtype, axes)"
        )


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
