"""Architectures compared: same data, same tokens, same FLOPs or parameters, paired by seed.

A flagfile's name up to its first dot is its architecture; seed and learning rate are what the flags
say. Where an architecture has several learning rates, the one that is best with the selection seed
is chosen, and that seed is scored for none: the choice does not count in its own favour. Of the
other rates, only the runs with the selection seed are needed.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from genai_jax.config import ConfigError, field
from genai_jax.scaling.report import Section, Table
from genai_jax.scaling.study.curves import legend
from genai_jax.scaling.study.folder import Run
from genai_jax.scaling.study.groups import (
    Model,
    group_of,
    grouped,
    label_of,
    learning_rate,
    models_of,
    seed,
)
from genai_jax.scaling.study.results import Result
from genai_jax.scaling.study.settings import StudyConfig, names

LEVEL = 0.95
HOW_READ = ("data.prefetch", "data.data_dir")  # changes nothing of what is read
RESAMPLES = 10_000


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


class Difference(NamedTuple):
    """Of an architecture's score to the baseline's, over paired seeds."""

    mean: float
    low: float
    high: float
    pairs: int


def needed(
    runs: Sequence[Run], results: Mapping[str, list[Result]], config: ComparisonConfig
) -> list[Run]:
    """The runs that the comparison needs, given the results there are so far.

    First those with the selection seed; once an architecture's are there, the other seeds of the
    learning rate that is chosen.

    Raises:
      ConfigError: architectures that are not alike, a baseline that is not there, too few seeds.
    """
    architectures = grouped(models_of(runs))
    _check(architectures, config)
    wanted = []
    for models in architectures.values():
        rates = {learning_rate(m) for m in models}
        selecting = [m for m in models if seed(m) == config.selection_seed]
        if len(rates) == 1:
            wanted += [m.run for m in models]
            continue
        wanted += [m.run for m in selecting]
        if all(m.name in results for m in selecting):
            found = [r for m in selecting for r in results[m.name]]
            best = chosen_rate(found, config)
            wanted += [m.run for m in models if learning_rate(m) == best]
    return [run for run in runs if run in wanted]


def chosen_rate(results: Sequence[Result], config: ComparisonConfig) -> float:
    """The learning rate with the best score among the results with the selection seed."""
    tried = [r for r in results if seed(r) == config.selection_seed]
    if not tried:
        raise ConfigError(
            f"{group_of(results[0])} has no finished run with "
            f"--study.selection_seed={config.selection_seed}, which chooses its learning rate"
        )
    best = min(tried, key=lambda r: r.final(config.metric))
    if not math.isfinite(best.final(config.metric)):
        raise ConfigError(
            f"{group_of(best)} diverged with every learning rate: "
            f"{', '.join(f'{learning_rate(r):g}' for r in tried)}"
        )
    return learning_rate(best)


def analyze(results: Sequence[Result], config: ComparisonConfig) -> list[Section]:
    """Scores of the architectures and their paired differences to the baseline.

    An architecture of which too much is missing, as its runs failed, is named and left out.

    Raises:
      ConfigError: the baseline has too few seeds, or no other architecture has enough.
    """
    architectures = grouped(results)
    if config.baseline not in architectures:
        raise ConfigError(f"no run of --study.baseline={config.baseline} is finished")
    chooses = any(len({learning_rate(r) for r in a}) > 1 for a in architectures.values())
    rates, scored, scores, differences, missing = {}, {}, {}, {}, []
    base = config.baseline
    for name in (base, *(n for n in architectures if n != base)):
        try:
            rate, members = _scored(architectures[name], chooses, config)
            own = {seed(r): r.final(config.metric) for r in members}
            if name != base:
                differences[name] = paired_difference(own, scores[base], config, name)
        except ConfigError as error:
            if name == base:
                raise
            missing.append(str(error))
        else:
            rates[name], scored[name], scores[name] = rate, members, own
    if not differences:
        raise ConfigError("; ".join(missing) or f"no other architecture than {base} is finished")
    return [
        _main_section(scored, scores, rates, differences, missing, config),
        _matching_section(scored, config),
        _rates_section({n: m for n, m in architectures.items() if n in rates}, rates, config),
    ]


def paired_difference(
    scores: Mapping[int, float], baseline: Mapping[int, float], config: ComparisonConfig, name: str
) -> Difference:
    """Mean over common seeds of score - baseline, with its interval.

    Student's t: mean +- t(0.975, n - 1) s / sqrt(n). Bootstrap: percentiles of the means of
    resampled pairs (Efron 1979); with few seeds it is too narrow.
    """
    common = sorted(scores.keys() & baseline.keys())
    if len(common) < config.seeds:
        raise ConfigError(
            f"{name} and {config.baseline} have {len(common)} scored seed(s) in common, "
            f"--study.seeds={config.seeds} are needed"
        )
    values = np.array([scores[s] - baseline[s] for s in common], np.float64)
    mean, n = float(np.mean(values)), len(values)
    if not np.all(np.isfinite(values)):
        return Difference(mean, math.nan, math.nan, n)
    if config.interval == "bootstrap":
        drawn = np.random.default_rng(0).integers(0, n, (RESAMPLES, n))
        tails = [50 * (1 - LEVEL), 50 * (1 + LEVEL)]
        low, high = np.percentile(values[drawn].mean(1), tails)
        return Difference(mean, float(low), float(high), n)
    from scipy.stats import t

    half = t.ppf((1 + LEVEL) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n)
    return Difference(mean, float(mean - half), float(mean + half), n)


def _scored(
    members: Sequence[Result], chooses: bool, config: ComparisonConfig
) -> tuple[float, list[Result]]:
    """(the learning rate, the results with it that are scored) of an architecture.

    chooses: the selection seed chooses for any architecture, so that it is scored for none.
    """
    tried = {learning_rate(r) for r in members}
    rate = chosen_rate(members, config) if len(tried) > 1 else tried.pop()
    free = [r for r in members if not chooses or seed(r) != config.selection_seed]
    return rate, [r for r in free if learning_rate(r) == rate]


def _check(architectures: Mapping[str, list[Model]], config: ComparisonConfig):
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
    ours, theirs = _matched(model, config), _matched(base, config)
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


def _matched(model: Model | Result, config: ComparisonConfig) -> float:
    """What `match` says, of one model."""
    if config.match == "parameters":
        return model.counts.parameters
    return model.counts.flops_per_step * model.config.train.steps


def _main_section(scored, scores, rates, differences, missing, config) -> Section:
    rows, numbers, remarks = [], {}, config.remarks()
    also = names(config.also)
    for name in sorted(scores, key=lambda name: float(np.mean([*scores[name].values()]))):
        values = np.array([*scores[name].values()], np.float64)
        finite = bool(np.all(np.isfinite(values)))
        mean, spread = float(np.mean(values)), float(np.std(values, ddof=1)) if finite else math.nan
        found = differences.get(name)
        numbers |= {f"{name}/{config.metric}": mean, f"{name}/learning_rate": rates[name]}
        if found:
            numbers |= {
                f"{name}/difference": found.mean,
                f"{name}/difference_low": found.low,
                f"{name}/difference_high": found.high,
            }
        more = [float(np.mean([r.final(metric) for r in scored[name]])) for metric in also]
        rows.append(
            (
                name, mean, spread, len(values),
                *(found[:3] if found else (None, None, None)),
                _verdict(found), *more, rates[name], remarks.get(name),
            )
        )  # fmt: skip
    columns = (
        "architecture", config.metric, "deviation", "seeds", "difference", "low", "high",
        "against the baseline", *also, "learning rate", "note",
    )  # fmt: skip
    how = {
        "t": "by Student's t over the paired seeds",
        "bootstrap": f"by {RESAMPLES:,} bootstrap resamples of the paired seeds",
    }[config.interval]
    order = ", so with the same data in the same order" if config.same_data else ""
    label = label_of(scored[config.baseline][0], config.metric)
    text = (
        f"Mean {label} over seeds at the last step, the lower the better, its "
        f"standard deviation over seeds, and the difference to {config.baseline} with the same "
        f"seed{order}. Intervals are {LEVEL:.0%}, {how}, each on its "
        f"own: with {len(differences)} comparison(s) they are not corrected for their number."
    )
    drop = [i for i, c in enumerate(columns) if c == "note" and not remarks]
    keep = lambda row: tuple(cell for i, cell in enumerate(row) if i not in drop)
    table = Table("comparison", keep(columns), [keep(row) for row in rows])
    figures = {"differences": _differences_figure(differences, label, config)}
    left_out = [f"Left out: {reason}." for reason in missing]
    return Section("Comparison", [text, *left_out], [table], figures, numbers)


def _verdict(found: Difference | None) -> str:
    if found is None:
        return "is the baseline"
    if found.high < 0:
        return "better"
    return "worse" if found.low > 0 else "not told apart"


def _matching_section(scored, config) -> Section:
    base = scored[config.baseline][0]
    rows = []
    for name, members in scored.items():
        first = members[0]
        off = _matched(first, config) / _matched(base, config) - 1
        counts = first.counts
        rows.append(
            (
                name, counts.parameters, counts.non_embedding, counts.active, first.tokens,
                first.flops, 100 * off,
            )
        )  # fmt: skip
    columns = (
        "architecture", "parameters", "non-embedding", "active", "tokens or examples", "FLOPs",
        f"{config.match} against the baseline (%)",
    )  # fmt: skip
    data = "the same data, as many tokens" if config.same_data else "the data of their flagfiles"
    text = (
        f"All see {data}, and are matched by {config.match} within {config.tolerance:.1%}. "
        f"FLOPs: {base.counts.convention}."
    )
    return Section("What is matched", [text], [Table("matching", columns, rows)])


def _rates_section(architectures, rates, config) -> Section:
    """Every learning rate that was tried with the selection seed."""
    rows, edges = [], []
    for name, members in architectures.items():
        tried = [r for r in members if seed(r) == config.selection_seed]
        if len({learning_rate(r) for r in tried}) < 2:
            continue
        ordered = sorted(tried, key=learning_rate)
        if rates[name] in (learning_rate(ordered[0]), learning_rate(ordered[-1])):
            edges.append(name)
        for r in ordered:
            mark = "chosen" if learning_rate(r) == rates[name] else None
            rows.append((name, learning_rate(r), r.final(config.metric), mark))
    if not rows:
        return Section("Learning rates", ["Every architecture has one learning rate."])
    paragraphs = [
        f"The rate of each architecture is the best with seed {config.selection_seed}, on the same "
        "budget; that seed is not scored above."
    ]
    if edges:
        paragraphs.append(
            f"At the edge of what was tried, so perhaps not the best: {', '.join(edges)}."
        )
    columns = ("architecture", "learning rate", config.metric, "")
    label = label_of(architectures[config.baseline][0], config.metric)
    figures = {"learning_rates": _rates_figure(rows, label)}
    return Section("Learning rates", paragraphs, [Table("learning_rates", columns, rows)], figures)


def _differences_figure(
    differences: Mapping[str, Difference], label: str, config: ComparisonConfig
):
    from matplotlib.figure import Figure

    finite = {name: found for name, found in differences.items() if math.isfinite(found.mean)}
    ordered = sorted(finite.items(), key=lambda item: -item[1].mean)
    figure = Figure(figsize=(7, 1.4 + 0.4 * len(ordered)), layout="constrained")
    axes = figure.subplots()
    means = [found.mean for _, found in ordered]
    spans = [[f.mean - f.low for _, f in ordered], [f.high - f.mean for _, f in ordered]]
    axes.errorbar(means, range(len(ordered)), xerr=spans, fmt="o", capsize=4)
    axes.set_yticks(range(len(ordered)), [name for name, _ in ordered])
    axes.set_ylim(-0.6, len(ordered) - 0.4)
    axes.axvline(0, color="gray", lw=1)
    axes.set_xlabel(f"difference to {config.baseline}, {label}, {LEVEL:.0%} interval")
    axes.grid(alpha=0.3, axis="x")
    return figure


def _rates_figure(rows: Sequence[tuple], label: str):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row[0] for row in rows):
        own = [row for row in rows if row[0] == name and math.isfinite(row[2])]
        axes.plot([row[1] for row in own], [row[2] for row in own], marker="o", label=name)
    axes.set(xlabel="learning rate", ylabel=label, xscale="log")
    axes.grid(alpha=0.3)
    legend(figure, axes, len(axes.lines))
    return figure
