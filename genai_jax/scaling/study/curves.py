"""Metrics over training, and how the last ones depend on one flag: for phenomena, not for laws."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from genai_jax.config import ConfigError, field
from genai_jax.scaling.report import Section, Table, file_name
from genai_jax.scaling.study.groups import flag_value, grouped, label_of
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


def analyze(results: Sequence[Result], config: CurvesConfig) -> list[Section]:
    """Curves, a table of last and best values, and the last values against a flag.

    Raises:
      ConfigError: a metric that no run has; a flag that is no number.
    """
    metrics = names(config.metrics)
    for metric in metrics:
        if not any(r.curve(metric)[0] for r in results):
            known = sorted({n for r in results for row in r.rows for n in row if n != "step"})
            raise ConfigError(f"--study.metrics: no run has {metric}; there are {', '.join(known)}")
    sections = [
        _curves_section(results, metrics, config),
        _values_section(results, metrics, config),
    ]
    if config.against:
        sections.append(_against_section(results, metrics, config))
    return sections


def _curves_section(results, metrics, config) -> Section:
    if config.panels == "metric":
        figures = {
            file_name(metric): _figure(
                {r.name: (r, metric) for r in results}, label_of(results[0], metric), "", config
            )
            for metric in metrics
        }
    else:
        figures = {
            file_name(r.name): _figure(
                {label_of(r, m): (r, m) for m in metrics}, "", r.name, config
            )
            for r in results
        }
    return Section("Curves", ["As logged while training."], [], figures)


def _figure(lines: dict[str, tuple[Result, str]], label: str, title: str, config: CurvesConfig):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    for name, (result, metric) in lines.items():
        steps, values = result.curve(metric)
        scale = {
            "step": 1,
            "tokens": result.counts.tokens_per_step,
            "flops": result.counts.flops_per_step,
        }[config.over]
        marker = "o" if len(steps) < 15 else None
        axes.plot(np.array(steps) * scale, values, label=name, marker=marker, markersize=4, lw=1.3)
    where = {"step": "step", "tokens": "tokens or examples seen", "flops": "FLOPs"}[config.over]
    axes.set(xlabel=where, ylabel=label, title=title)
    if config.log_over:
        axes.set_xscale("log")
    return _finished(figure, axes, config, len(lines))


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


def _values_section(results, metrics, config) -> Section:
    reach = config.reach
    rows, numbers = [], {}
    for result in results:
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


def _against_section(results, metrics, config) -> Section:
    """The last values against a flag or a quantity, a line for each group of runs."""
    if config.against in QUANTITIES:
        label, value = QUANTITIES[config.against]
    else:
        label = f"--{config.against}"
        value = lambda r: flag_value("study.against", config.against, r)
    rows, figures = [], {}
    for metric in metrics:
        lines = {}
        for group, members in grouped(results).items():
            ends = [(value(r), *r.curve(metric)[1][-1:]) for r in members]
            lines[group] = sorted(pair for pair in ends if len(pair) == 2)
            rows += [(metric, group, *pair) for pair in lines[group]]
        figures[f"{file_name(metric)}_against_{file_name(config.against)}"] = _lines_figure(
            lines, label, label_of(results[0], metric), config
        )
    columns = ("metric", "runs", label, "last value")
    text = [f"The last value of each run against {label}."]
    return Section(f"Against {label}", text, [Table("against", columns, rows)], figures)


def _lines_figure(lines: dict[str, list], label: str, metric: str, config: CurvesConfig):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for group, points in lines.items():
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=group)
    axes.set(xlabel=label, ylabel=f"{metric}, last")
    xs = [x for points in lines.values() for x, _ in points]
    if xs and min(xs) > 0 and max(xs) / min(xs) >= 8:
        axes.set_xscale("log")
    return _finished(figure, axes, config, len(lines))
