"""What makes architectures comparable: the flags of a comparison, and its checks before any run."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from genai_jax.config import ConfigError, field
from genai_jax.scaling.study.groups import Model, learning_rate, seed
from genai_jax.scaling.study.results import Result
from genai_jax.scaling.study.settings import StudyConfig

HOW_READ = ("data.prefetch", "data.data_dir")  # changes nothing of what is read


@dataclasses.dataclass(frozen=True)
class ComparisonConfig(StudyConfig):
    baseline: str = field("", "architecture that the others are compared with")
    match: str = field("flops", "what all must have alike", choices=("flops", "parameters"))
    tolerance: float = field(0.05, "largest relative difference in it", minimum=0)
    same_data: bool = field(
        True, "all must read one --data.dataset, and as many tokens or examples of it; off where "
        "tasks read the same data in other forms"
    )  # fmt: skip
    selection_seed: int = field(0, "seed that chooses the learning rate, and is not scored")
    seeds: int = field(3, "fewest scored seeds", minimum=2)
    interval: str = field(
        "t", "of a paired difference: Student's t, or bootstrap", choices=("t", "bootstrap")
    )
    also: str = field("", "further metrics that the table shows, comma-separated")
    notes: str = field("", "remarks for the table, as architecture: text; architecture: text")

    def remarks(self) -> dict[str, str]:
        """Architecture -> remark.

        Raises:
          ConfigError: a part without a colon.
        """
        found = {}
        for part in filter(None, (part.strip() for part in self.notes.split(";"))):
            name, colon, text = part.partition(":")
            if not colon:
                raise ConfigError(f"--study.notes: {part!r} is not of the form architecture: text")
            found[name.strip()] = text.strip()
        return found


def check(architectures: Mapping[str, list[Model]], config: ComparisonConfig):
    """Raises `ConfigError` for a study that cannot compare."""
    listed = ", ".join(architectures)
    if config.baseline not in architectures:
        raise ConfigError(
            f"--study.baseline={config.baseline or '(unset)'} is no architecture of the study; "
            f"there are {listed}"
        )
    if len(architectures) < 2:
        raise ConfigError(f"a comparison needs two architectures, there is {listed}")
    for name in config.remarks():
        if name not in architectures:
            raise ConfigError(f"--study.notes: {name} is no architecture of the study: {listed}")
    base = architectures[config.baseline][0]
    chooses = any(len({learning_rate(m) for m in a}) > 1 for a in architectures.values())
    for name, models in architectures.items():
        for model in models:
            _check_alike(model, base, config)
        _check_seeds(name, models, chooses, config)


def _check_seeds(name: str, models: Sequence[Model], chooses: bool, config: ComparisonConfig):
    """Enough seeds with every learning rate; the selection seed with every one of several."""
    rates = {learning_rate(m) for m in models}
    for rate in sorted(rates):
        seeds = {seed(m) for m in models if learning_rate(m) == rate}
        count = sum(learning_rate(m) == rate for m in models)
        if count > len(seeds):
            raise ConfigError(f"two runs of {name} have learning rate {rate:g} and the same seed")
        if len(rates) > 1 and config.selection_seed not in seeds:
            raise ConfigError(
                f"{name} has no run with learning rate {rate:g} and "
                f"--study.selection_seed={config.selection_seed}, which chooses among its rates"
            )
        scored = seeds - {config.selection_seed} if chooses else seeds
        if len(scored) < config.seeds:
            raise ConfigError(
                f"{name} has {len(scored)} scored seed(s) with learning rate {rate:g}, "
                f"--study.seeds={config.seeds} are needed"
            )


def _check_alike(model: Model, base: Model, config: ComparisonConfig):
    """Raises `ConfigError` if data, tokens, FLOPs or parameters are not the baseline's."""
    ours, theirs = _data(model), _data(base)
    for name in sorted(ours.keys() | theirs.keys()) if config.same_data else ():
        if ours.get(name) != theirs.get(name):
            raise ConfigError(
                f"{model.name} sees other {name} than {base.name}: {ours.get(name)} and "
                f"{theirs.get(name)}"
            )
    ours, theirs = matched(model, config), matched(base, config)
    off = ours / theirs - 1
    if abs(off) > config.tolerance:
        raise ConfigError(
            f"{model.name} is not matched: {ours:.4g} {config.match} against {theirs:.4g} of "
            f"{base.name}, {off:+.1%}; --study.tolerance={config.tolerance:g} is allowed"
        )


def _data(model: Model) -> dict[str, Any]:
    """What a model reads: the flags that say so, and how much."""
    items = model.config.items()
    flags = {f"--{n}": v for n, v in items.items() if n.startswith("data.") and n not in HOW_READ}
    amount = model.counts.tokens_per_step * model.config.train.steps
    return flags | {"tokens or examples": amount, "--eval.batches": items.get("eval.batches")}


def matched(model: Model | Result, config: ComparisonConfig) -> float:
    """What `match` says, of one model."""
    if config.match == "parameters":
        return model.counts.parameters
    return model.counts.flops_per_step * model.config.train.steps
