"""How runs are grouped: by their names up to the first dot, and by their flags."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from genai_jax.config import Config, ConfigError
from genai_jax.scaling.study.folder import Counts, Run
from genai_jax.scaling.study.results import Result
from genai_jax.training.population import member_config

T = TypeVar("T")


class Model(NamedTuple):
    """A model that a run will train: the run itself, or a member of its population."""

    run: Run
    config: Config

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def counts(self) -> Counts:
        return self.run.counts


def models_of(runs: Sequence[Run]) -> list[Model]:
    return [
        Model(run, member_config(run.config, k) if run.members > 1 else run.config)
        for run in runs
        for k in range(run.members)
    ]


def run_of(model: Model | Result) -> str:
    """The name of a model's run, without the number of a population's member."""
    return model.name.split("/")[0]


def unit_of(model: Model | Result, metric: str) -> str:
    """The unit of a metric: for losses that of the task, otherwise the name of the metric."""
    return model.counts.loss_unit if metric.endswith("/loss") else metric


def label_of(model: Model | Result, metric: str) -> str:
    """A metric with its unit, if it has one, for headings and axis labels."""
    unit = unit_of(model, metric)
    return metric if unit == metric else f"{metric} ({unit})"


def flag_label(name: str) -> str:
    """A flag in words, for headings and axis labels: "unique tokens (--data.unique_tokens)"."""
    return f"{name.rpartition('.')[2].replace('_', ' ')} (--{name})"


def group_of(model: Model | Result) -> str:
    """The architecture or variant of a model: its run's name up to the first dot."""
    return run_of(model).split(".")[0]


def grouped(models: Sequence[T]) -> dict[str, list[T]]:
    """Group -> its models, in order of first appearance."""
    groups: dict[str, list[T]] = {}
    for model in models:
        groups.setdefault(group_of(model), []).append(model)
    return groups


def learning_rate(model: Model | Result) -> float:
    return model.config.optimizer.learning_rate


def seed(model: Model | Result) -> int:
    return model.config.run.seed


def flag_value(flag: str, name: str, model: Model | Result) -> float:
    """The numeric value of the flag `name` of a model.

    Raises:
      ConfigError: the model has no such flag, or its value is not a number; the message names
        `flag`, whose value `name` is.
    """
    values = model.config.items()
    if name not in values:
        raise ConfigError(f"--{flag}={name} is not a flag of run {model.name}")
    value = values[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"--{flag}={name} is {value!r} in run {model.name}, not a number")
    return value
