"""Metrics over training, and how their final values depend on a flag.

Matplotlib is imported where a figure is drawn, so that commands start without it.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from genai_jax.config import ConfigError, field
from genai_jax.scaling.edges import edge, sentences, step_sentences
from genai_jax.scaling.report import file_name
from genai_jax.scaling.report_types import Section, Table
from genai_jax.scaling.study.folder import Run
from genai_jax.scaling.study.groups import (
    flag_label,
    flag_value,
    grouped,
    label_of,
    learning_rate,
    models_of,
    run_of,
)
from genai_jax.scaling.study.results import Result
from genai_jax.scaling.study.settings import StudyConfig, names

# Quantities, besides the flags, that a metric can be plotted against.
QUANTITIES: dict[str, tuple[str, Callable[[Result], float]]] = {
    "parameters": ("parameters", lambda r: r.counts.parameters),
    "non_embedding": ("non-embedding parameters", lambda r: r.counts.non_embedding),
    "tokens": ("tokens or examples seen", lambda r: r.tokens),
    "flops": ("training compute (FLOPs)", lambda r: r.flops),
}


@dataclasses.dataclass(frozen=True)
class CurvesConfig(StudyConfig):
    metrics: str = field("train/loss,eval/loss", "Metrics to plot, comma-separated.")
    panels: str = field(
        "metric",
        "Draw one figure per metric with all runs, or one per run with all metrics.",
        choices=("metric", "run"),
    )
    over: str = field(
        "step", "Quantity on the horizontal axis.", choices=("step", "tokens", "flops")
    )
    log_over: bool = field(False, "Whether the horizontal axis is logarithmic.")
    log_metric: bool = field(False, "Whether the vertical axis is logarithmic.")
    reach: float | None = field(
        None, "Threshold: report the first step at which each metric reaches it (at most the "
        "threshold for losses, at least the threshold otherwise).",
    )  # fmt: skip
    against: str = field(
        "",
        "Plot the final values against this flag (its name without dashes), or one of "
        f"{', '.join(QUANTITIES)}.",
    )


def check(runs: Sequence[Run], config: CurvesConfig):
    """Raises `ConfigError` if the runs have no number for ``--study.against``."""
    if not config.against or config.against in QUANTITIES:
        return
    for model in models_of(runs):
        if config.against not in model.config.items():
            raise ConfigError(
                f"--study.against={config.against} is neither a flag of run {model.name} (its name "
                f"without dashes) nor one of {', '.join(QUANTITIES)}"
            )
        flag_value("study.against", config.against, model)


class Line(NamedTuple):
    """A line of a figure: the mean of one or more models of a run, and the models themselves."""

    mean: Result
    models: list[Result]

    @property
    def name(self) -> str:
        return self.mean.name


def lines_of(results: Sequence[Result]) -> list[Line]:
    """A line per run; members of a population that differ only in their seed share one."""
    groups: dict[tuple, list[Result]] = {}
    for r in results:
        groups.setdefault((run_of(r), learning_rate(r)), []).append(r)
    return [Line(_mean(models), models) for models in groups.values()]


def _mean(models: Sequence[Result]) -> Result:
    """Means over the models that have a metric at a step; a diverged model stops having it."""
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
    """Curves, a table of final and best values, and the final values against a flag.

    Models that differ only in their seed are averaged.

    Raises:
      ConfigError: a metric that no run has, or a flag whose value is not a number.
    """
    metrics = names(config.metrics)
    for metric in metrics:
        if not any(r.curve(metric)[0] for r in results):
            known = sorted({n for r in results for row in r.rows for n in row if n != "step"})
            raise ConfigError(
                f"--study.metrics: no run has {metric}; the metrics are {', '.join(known)}"
            )
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
                {label_of(line.mean, m): (line, m) for m in metrics},
                shared_name(metrics),
                line.name,
                config,
            )
            for line in lines
        }
    return Section("Curves", ["As logged during training." + _about(lines)], [], figures)


def shared_name(metrics: Sequence[str]) -> str:
    """What metrics of one axis have in common: "accuracy" of train/accuracy and eval/accuracy."""
    last = {metric.rpartition("/")[2].replace("_", " ") for metric in metrics}
    return last.pop() if len(last) == 1 else "value"


def _about(lines: Sequence[Line]) -> str:
    """A sentence for the reader about the means in a figure or table; empty if there are none."""
    most = max(len(line.models) for line in lines)
    return f" Means over up to {most} seeds; single seeds are shown pale." if most > 1 else ""


def _figure(named: dict[str, tuple[Line, str]], label: str, title: str, config: CurvesConfig):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    for name, (line, metric) in named.items():
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
    one = len(named) == 1
    where = {"step": "step", "tokens": "tokens or examples seen", "flops": "FLOPs"}[config.over]
    axes.set(xlabel=where, ylabel=label, title=title or (next(iter(named)) if one else ""))
    return _finished(figure, axes, config, len(named), log_x=config.log_over)


def _finished(figure, axes, config, count: int, log_x: bool):
    """The figure with its scales, a grid, and a legend if there are several lines."""
    from genai_jax.scaling.log_axis import log_axes

    log_axes(axes, *("x" if log_x else ""), *("y" if config.log_metric else ""))
    axes.grid(alpha=0.3)
    if count > 1:  # the title or the text names a single line
        legend(figure, axes, count)
    return figure


def legend(figure, axes, count: int):
    """Adds a legend: beside the axes if there are too many lines to fit it inside."""
    if count > 6:
        figure.legend(loc="outside right upper", fontsize="small")
    else:
        axes.legend(fontsize="small")


def _values_section(lines: Sequence[Line], metrics, config) -> Section:
    reach = config.reach
    rows, numbers, improving = [], {}, []
    for result, _ in lines:
        for metric in metrics:
            steps, values = result.curve(metric)
            if not values:
                continue
            best = int(np.argmin(values) if _falls(metric) else np.argmax(values))
            name, row = f"{result.name}/{metric}", [values[-1], values[best], steps[best]]
            numbers |= {name: values[-1], f"{name}/best": values[best]}
            sign = 1 if _falls(metric) else -1
            at = edge((step, sign * v) for step, v in zip(steps, values, strict=True))
            improving.append((metric, result.name, at))
            if reach is not None:
                row.append(_reaches(steps, values, metric, reach))
                numbers[f"{name}/reached"] = math.nan if row[-1] is None else row[-1]
            rows.append((result.name, metric, *row))
    columns = ["run", "metric", "last", "best", "at step"]
    if reach is not None:
        columns.append(f"first step at {reach:g}")
    text = [
        "The best value is the lowest for losses, perplexities and bits, and the highest for other "
        "metrics.",
        *step_sentences(improving),
    ]
    return Section("Values", text, [Table("values", tuple(columns), rows)], {}, numbers)


def _falls(metric: str) -> bool:
    """Whether lower is better for a metric."""
    return any(word in metric for word in ("loss", "nll", "perplexity", "bits", "error", "grad"))


def _reaches(steps, values, metric: str, threshold: float) -> int | None:
    """The first step whose value is at least the threshold, or at most if lower is better."""
    for step, value in zip(steps, values, strict=True):
        if value <= threshold if _falls(metric) else value >= threshold:
            return step
    return None


def _against_section(lines: Sequence[Line], metrics, config) -> Section:
    """The final values against a flag or a quantity, connected within each group of runs."""
    if config.against in QUANTITIES:
        label, value = QUANTITIES[config.against]
    else:
        label = flag_label(config.against)
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
    text = [f"The final value of each run against {label}." + _about(lines)]
    for metric in metrics:
        text += sentences(label, _edges(rows, metric), f"best {metric}")
    return Section(f"Against {label}", text, [Table("against", columns, rows)], figures)


def _edges(rows: Sequence[tuple], metric: str) -> list[tuple[str, str]]:
    """(group of runs, `edge`) from rows (metric, group, x, final value, seeds)."""
    sign = 1 if _falls(metric) else -1
    points: dict[str, list[tuple[float, float]]] = {}
    for of, group, x, value, _ in rows:
        if of == metric:
            points.setdefault(group, []).append((x, sign * value))
    return [(group, edge(own)) for group, own in points.items()]


def _ends(line: Line, metric: str) -> list[float]:
    """The final value of each of the line's models that has one."""
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
    axes.set(xlabel=label, ylabel=f"final {metric}")
    xs = [x for points in groups.values() for x, _, _ in points]
    log_x = bool(xs) and min(xs) > 0 and max(xs) / min(xs) >= 8
    return _finished(figure, axes, config, len(groups), log_x)
