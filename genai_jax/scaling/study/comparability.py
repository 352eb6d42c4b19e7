"""The flags of a comparison, and checks before training that its architectures are comparable."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from genai_jax.config import ConfigError, field
from genai_jax.scaling.study.groups import Model, learning_rate, seed
from genai_jax.scaling.study.results import Result
from genai_jax.scaling.study.settings import StudyConfig, chosen

T = TypeVar("T")
HOW_READ = ("data.prefetch", "data.data_dir")  # do not change which data are read


@dataclasses.dataclass(frozen=True)
class ComparisonConfig(StudyConfig):
    baseline: str = field("", "Architecture that the others are compared with.")
    match: str = field(
        "flops", "Quantity in which all architectures must agree.", choices=("flops", "parameters")
    )
    tolerance: float = field(
        0.05, "Largest relative difference in that quantity to the baseline.", minimum=0
    )
    same_data: bool = field(
        True, "Whether all runs must have the same --data.* flags and see equally many tokens or "
        "examples; turn it off if tasks read the same data in different forms."
    )  # fmt: skip
    selection_metric: str | None = field(
        None, "Metric that chooses the learning rate, lower is better; --study.metric if unset."
    )
    selection_seed: int = field(
        0, "Seed whose runs choose the learning rate and are then not scored."
    )
    seeds: int = field(3, "Smallest number of scored seeds per architecture.", minimum=2)
    interval: str = field(
        "t", "Confidence interval of the paired differences: Student's t or bootstrap.",
        choices=("t", "bootstrap"),
    )  # fmt: skip
    references: str = field(
        "", "Architectures to list beside the others without matching them, such as models that "
        "are fitted without gradients: comma-separated names, which may contain * and ?. One seed "
        "is enough.",
    )  # fmt: skip
    also: str = field("", "Additional metrics to show in the table, comma-separated.")
    notes: str = field("", "Notes for the table, as architecture: text; architecture: text.")

    @property
    def selects_by(self) -> str:
        """The metric that chooses the learning rate."""
        return self.selection_metric or self.metric

    def split(
        self, architectures: Mapping[str, list[T]], *, missing_ok: bool = False
    ) -> tuple[dict[str, list[T]], dict[str, list[T]]]:
        """(architectures that are compared, references).

        Raises:
          ConfigError: a name or pattern in `references` without an architecture, unless
            `missing_ok`; the baseline is among the references.
        """
        listed = [*architectures]
        references = chosen(
            "study.references", self.references, listed, missing_ok=missing_ok, what="architecture"
        )
        if self.baseline in references:
            raise ConfigError(
                f"--study.references={self.references} contains --study.baseline={self.baseline}"
            )
        compared = {n: m for n, m in architectures.items() if n not in references}
        return compared, {n: architectures[n] for n in references}

    def parsed_notes(self) -> dict[str, str]:
        """Architecture -> note.

        Raises:
          ConfigError: a part without a colon.
        """
        by_name = {}
        for part in filter(None, (part.strip() for part in self.notes.split(";"))):
            name, colon, text = part.partition(":")
            if not colon:
                raise ConfigError(f"--study.notes: {part!r} is not of the form architecture: text")
            by_name[name.strip()] = text.strip()
        return by_name


def check(architectures: Mapping[str, list[Model]], config: ComparisonConfig):
    """Raises `ConfigError` for a study whose architectures cannot be compared."""
    listed = ", ".join(architectures)
    if config.baseline not in architectures:
        raise ConfigError(
            f"--study.baseline={config.baseline or '(unset)'} is not an architecture of the study; "
            f"its architectures are {listed}"
        )
    compared, _ = config.split(architectures)
    if len(compared) < 2:
        raise ConfigError(
            f"a comparison needs two architectures, but there is only {', '.join(compared)}"
        )
    for name in config.parsed_notes():
        if name not in architectures:
            raise ConfigError(
                f"--study.notes: {name} is not an architecture of the study; its architectures are "
                f"{listed}"
            )
    base = architectures[config.baseline][0]
    chooses = any(len({learning_rate(m) for m in a}) > 1 for a in compared.values())
    for name, models in compared.items():
        for model in models:
            _check_alike(model, base, config)
        _check_seeds(name, models, chooses, config)


def _check_seeds(name: str, models: Sequence[Model], chooses: bool, config: ComparisonConfig):
    """Checks for enough seeds per learning rate, and for the selection seed if it is needed."""
    rates = {learning_rate(m) for m in models}
    for rate in sorted(rates):
        seeds = {seed(m) for m in models if learning_rate(m) == rate}
        count = sum(learning_rate(m) == rate for m in models)
        if count > len(seeds):
            raise ConfigError(f"two runs of {name} with learning rate {rate:g} have the same seed")
        if len(rates) > 1 and config.selection_seed not in seeds:
            raise ConfigError(
                f"{name} has no run with learning rate {rate:g} and "
                f"--study.selection_seed={config.selection_seed}, which chooses its learning rate"
            )
        scored = seeds - {config.selection_seed} if chooses else seeds
        if len(scored) < config.seeds:
            raise ConfigError(
                f"{name} has {len(scored)} scored seed(s) with learning rate {rate:g}; "
                f"--study.seeds={config.seeds} are needed"
            )


def _check_alike(model: Model, base: Model, config: ComparisonConfig):
    """Raises `ConfigError` if data, tokens, FLOPs or parameters differ from the baseline's."""
    ours, theirs = _data(model), _data(base)
    for name in sorted(ours.keys() | theirs.keys()) if config.same_data else ():
        if ours.get(name) != theirs.get(name):
            raise ConfigError(
                f"{model.name} and {base.name} differ in {name}: {ours.get(name)} and "
                f"{theirs.get(name)}"
            )
    ours, theirs = matched(model, config), matched(base, config)
    off = ours / theirs - 1
    if abs(off) > config.tolerance:
        raise ConfigError(
            f"{model.name} has {ours:.4g} {config.match}, {off:+.1%} relative to the {theirs:.4g} "
            f"of {base.name}; --study.tolerance={config.tolerance:g} is allowed"
        )


def _data(model: Model) -> dict[str, Any]:
    """The flags that determine which data a model reads, and how much it reads."""
    items = model.config.items()
    flags = {f"--{n}": v for n, v in items.items() if n.startswith("data.") and n not in HOW_READ}
    amount = model.counts.tokens_per_step * model.config.train.steps
    return flags | {"tokens or examples": amount, "--eval.batches": items.get("eval.batches")}


def matched(model: Model | Result, config: ComparisonConfig) -> float:
    """The quantity that ``--study.match`` names, for one model."""
    if config.match == "parameters":
        return model.counts.parameters
    return model.counts.flops_per_step * model.config.train.steps
