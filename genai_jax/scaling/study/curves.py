"""Metrics over training, and how the last ones depend on one flag: for phenomena, not for laws."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from genai_jax.config import ConfigError, field
from genai_jax.scaling.report import file_name
from genai_jax.scaling.report_types import Section, Table
from genai_jax.scaling.study.folder import Run
from genai_jax.scaling.study.groups import (
    flag_value,
    grouped,
    label_of,
    learning_rate,
    models_of,
    run_of,
)
from genai_jax.scaling.study.results import Result
from genai_jax.scaling.study.settings import StudyConfig, names

# What a model can be drawn against, beside its flags.
QUANTITIES: dict[str, tuple[str, Callable[[Result], float]]] = {
    "parameters": ("parameters", lambda r: r.counts.parameters),
    "non_embedding": ("non-embedding parameters", lambda r: r.counts.non_embedding),
    "tokens": ("tokens or examples seen", lambda r: r.tokens),
    "flops": ("training compute (FLOPs)", lambda r: r.flops),
}


@dataclasses.dataclass(frozen=True)
class CurvesConfig(StudyConfig):
    metrics: str = field("train/loss,eval/loss", "what is drawn, comma-separated")
    panels: str = field(
        "metric",
        "a figure for every metric with all runs, or the other way",
        choices=("metric", "run"),
    )
    over: str = field("step", "horizontal axis", choices=("step", "tokens", "flops"))
    log_over: bool = field(False, "horizontal axis is logarithmic")
    log_metric: bool = field(False, "vertical axis is logarithmic")
    reach: float | None = field(
        None, "also the first step at which a metric is at least this; for losses, at most"
    )
    against: str = field(
        "",
        "also the last values against a flag of the runs (its name without dashes), or one of "
        + "|".join(QUANTITIES),
    )


def check(runs: Sequence[Run], config: CurvesConfig):
    """Raises `ConfigError` if the last values could not be drawn against what the flags say."""
    if not config.against or config.against in QUANTITIES:
        return
    for model in models_of(runs):
        if config.against not in model.config.items():
            raise ConfigError(
                f"--study.against={config.against} is no flag of run {model.name}, without dashes, "
                f"and none of {', '.join(QUANTITIES)}"
            )
        flag_value("study.against", config.against, model)


class Line(NamedTuple):
    """A run: what is drawn of it, and its models, of which that is the mean."""

    mean: Result
    models: list[Result]

    @property
    def name(self) -> str:
        return self.mean.name


def lines_of(results: Sequence[Result]) -> list[Line]:
    """A line for each run; members of a population that differ in the seed alone make one."""
    found: dict[tuple, list[Result]] = {}
    for r in results:
        found.setdefault((run_of(r), learning_rate(r)), []).append(r)
    return [Line(_mean(models), models) for models in found.values()]


def _mean(models: Sequence[Result]) -> Result:
    """Means of those that have a metric at a step: one that diverged has none from there on."""
    if len(models) == 1:
        return models[0]
    rows = []
    for same in zip(*(m.rows for m in models), strict=True):
        values: dict[str, list[float]] = {}
        for row in same:
            for name, value in row.items():
                values.setdefault(name, []).append(value)
        means = {name: float(np.mean(v)) for name, v in values.items()}
        rows.append(means | {"step": same[0]["step"]})
    return models[0]._replace(name=run_of(models[0]), rows=rows)


def analyze(results: Sequence[Result], config: CurvesConfig) -> list[Section]:
    """Curves, a table of last and best values, and the last values against a flag.

    Of a population that differs in the seed alone, all of them are of the mean.

    Raises:
      ConfigError: a metric that no run has; a flag that is no number.
    """
    metrics = names(config.metrics)
    for metric in metrics:
        if not any(r.curve(metric)[0] for r in results):
            known = sorted({n for r in results for row in r.rows for n in row if n != "step"})
            raise ConfigError(f"--study.metrics: no run has {metric}; there are {', '.join(known)}")
    lines = lines_of(results)
    sections = [_curves_section(lines, metrics, config), _values_section(lines, metrics, config)]
    if config.against:
        sections.append(_against_section(lines, metrics, config))
    return sections


def _curves_section(lines: Sequence[Line], metrics, config) -> Section:
    first = lines[0].mean
    if config.panels == "metric":
        figures = {
            file_name(metric): _figure(
                {line.name: (line, metric) for line in lines}, label_of(first, metric), "",
                config,
            )
            for metric in metrics
        }  # fmt: skip
    else:
        figures = {
            file_name(line.name): _figure(
                {label_of(line.mean, m): (line, m) for m in metrics}, "", line.name, config
            )
            for line in lines
        }
    return Section("Curves", ["As logged while training." + _about(lines)], [], figures)


def _about(lines: Sequence[Line]) -> str:
    """What a reader of a figure or table has to know of the means in it."""
    most = max(len(line.models) for line in lines)
    return f" Of up to {most} seeds the mean; each of them is drawn pale." if most > 1 else ""


def _figure(drawn: dict[str, tuple[Line, str]], label: str, title: str, config: CurvesConfig):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    for name, (line, metric) in drawn.items():
        steps, values = line.mean.curve(metric)
        counts = line.mean.counts
        scale = {"step": 1, "tokens": counts.tokens_per_step, "flops": counts.flops_per_step}
        scale = scale[config.over]
        marker = "o" if len(steps) < 15 else None
        own = axes.plot(
            np.array(steps) * scale, values, label=name, marker=marker, markersize=4, lw=1.3
        )[0]
        for model in line.models if len(line.models) > 1 else ():
            steps, values = model.curve(metric)
            axes.plot(np.array(steps) * scale, values, color=own.get_color(), lw=0.8, alpha=0.3)
    where = {"step": "step", "tokens": "tokens or examples seen", "flops": "FLOPs"}[config.over]
    axes.set(xlabel=where, ylabel=label, title=title)
    if config.log_over:
        axes.set_xscale("log")
    return _finished(figure, axes, config, len(drawn))


def _finished(figure, axes, config, count: int):
    """The figure with what all of them have: the metric's scale, a grid, a legend of `count`."""
    if config.log_metric:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    legend(figure, axes, count)
    return figure


def legend(figure, axes, count: int):
    """Beside the axes where there are too many lines to leave room in them."""
    if count > 6:
        figure.legend(loc="outside right upper", fontsize="small")
    else:
        axes.legend(fontsize="small")


def _values_section(lines: Sequence[Line], metrics, config) -> Section:
    reach = config.reach
    rows, numbers = [], {}
    for result, _ in lines:
        for metric in metrics:
            steps, values = result.curve(metric)
            if not values:
                continue
            best = int(np.argmin(values) if _falls(metric) else np.argmax(values))
            name, row = f"{result.name}/{metric}", [values[-1], values[best], steps[best]]
            numbers |= {name: values[-1], f"{name}/best": values[best]}
            if reach is not None:
                row.append(_reaches(steps, values, metric, reach))
                numbers[f"{name}/reached"] = math.nan if row[-1] is None else row[-1]
            rows.append((result.name, metric, *row))
    columns = ["run", "metric", "last", "best", "at step"]
    if reach is not None:
        columns.append(f"first step at {reach:g}")
    text = ["The best value is the lowest of a loss, perplexity or bits, the highest of others."]
    return Section("Values", text, [Table("values", tuple(columns), rows)], {}, numbers)


def _falls(metric: str) -> bool:
    """Whether a metric is the better the lower it is."""
    return any(word in metric for word in ("loss", "nll", "perplexity", "bits", "error", "grad"))


def _reaches(steps, values, metric: str, threshold: float) -> int | None:
    """The first step whose value is at least the threshold, or at most where low is good."""
    for step, value in zip(steps, values, strict=True):
        if value <= threshold if _falls(metric) else value >= threshold:
            return step
    return None


def _against_section(lines: Sequence[Line], metrics, config) -> Section:
    """The last values against a flag or a quantity, joined within each group of runs."""
    if config.against in QUANTITIES:
        label, value = QUANTITIES[config.against]
    else:
        label = f"--{config.against}"
        value = lambda r: flag_value("study.against", config.against, r)
    rows, figures = [], {}
    for metric in metrics:
        groups = {}
        for group, members in grouped(lines).items():
            ends = [
                (value(line.mean), line.mean.curve(metric)[1][-1], _ends(line, metric))
                for line in members
                if line.mean.curve(metric)[1]
            ]
            groups[group] = sorted(ends)
            rows += [(metric, group, x, y, len(each)) for x, y, each in groups[group]]
        figures[f"{file_name(metric)}_against_{file_name(config.against)}"] = _against_figure(
            groups, label, label_of(lines[0].mean, metric), config
        )
    columns = ("metric", "runs", label, "last value", "seeds")
    text = [f"The last value of each run against {label}." + _about(lines)]
    return Section(f"Against {label}", text, [Table("against", columns, rows)], figures)


def _ends(line: Line, metric: str) -> list[float]:
    """The last value of each of its models that has one."""
    return [values[-1] for values in (m.curve(metric)[1] for m in line.models) if values]


def _against_figure(groups: dict[str, list], label: str, metric: str, config: CurvesConfig):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for group, points in groups.items():
        xs = [x for x, _, _ in points]
        own = axes.plot(xs, [y for _, y, _ in points], marker="o", label=group)[0]
        if any(len(each) > 1 for _, _, each in points):
            every = [(x, y) for x, _, each in points for y in each]
            axes.plot(*zip(*every, strict=True), "o", color=own.get_color(), ms=4, alpha=0.3)
    axes.set(xlabel=label, ylabel=f"{metric}, last")
    xs = [x for points in groups.values() for x, _, _ in points]
    if xs and min(xs) > 0 and max(xs) / min(xs) >= 8:
        axes.set_xscale("log")
    return _finished(figure, axes, config, len(groups))
