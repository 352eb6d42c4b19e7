"""Does the optimal learning rate stay the same as the network gets wider?

The name of a flagfile up to the first dot is its variant, such as a parametrization; width and
learning rate come from the flags. Runs that differ only in their seed are averaged.

Matplotlib is imported where a figure is drawn, so that commands start without it.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from genai_jax.config import ConfigError, field
from genai_jax.scaling.edges import edge, sentences
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
)
from genai_jax.scaling.study.results import Result
from genai_jax.scaling.study.settings import StudyConfig


@dataclasses.dataclass(frozen=True)
class TransferConfig(StudyConfig):
    width: str = field(
        "transformer.embed_dim", "Name, without dashes, of the flag that sets the network width."
    )


class Optimum(NamedTuple):
    """Minimum of the parabola, in log2 of the rate, through the lowest loss and its neighbors."""

    rate: float  # NaN if the lowest loss is the first or last
    loss: float
    curvature: float  # loss = loss at the optimum + curvature (log2 rate - log2 optimum)^2

    def at(self, rate: float) -> float:
        """The loss of the parabola at a learning rate."""
        return self.loss + self.curvature * (math.log2(rate) - math.log2(self.rate)) ** 2


def optimum(rates: Sequence[float], losses: Sequence[float]) -> Optimum:
    """The optimum of losses at increasing learning rates; diverged runs have infinite loss."""
    best = int(np.argmin(losses))
    around = slice(best - 1, best + 2)
    if best in (0, len(losses) - 1) or not np.all(np.isfinite(losses[around])):
        return Optimum(math.nan, losses[best], math.nan)
    x, y = np.log2(rates[around]), np.asarray(losses[around], np.float64)
    a, b, c = np.polyfit(x - x[1], y, 2)
    return Optimum(float(2 ** (x[1] - b / (2 * a))), float(c - b * b / (4 * a)), float(a))


def check(runs: Sequence[Run], config: TransferConfig):
    """Raises `ConfigError` if a run has no width."""
    for model in models_of(runs):
        flag_value("study.width", config.width, model)


def analyze(results: Sequence[Result], config: TransferConfig) -> list[Section]:
    """Loss against learning rate at every width, and how far the optimum moves.

    Raises:
      ConfigError: no variant has two widths with three learning rates each.
    """
    every = {name: _curves(members, config) for name, members in grouped(results).items()}
    variants, missing = _enough(every, config)
    if not variants:
        raise ConfigError("; ".join(missing))
    optima = {
        name: {width: optimum([*points], [*points.values()]) for width, points in curves.items()}
        for name, curves in variants.items()
    }
    label = label_of(results[0], config.metric)
    shift = _shift_section(optima, config)
    left_out = [f"Left out: {reason}." for reason in missing]
    unknown = _unknown(variants, optima, config)
    shift = shift._replace(paragraphs=[*left_out, *shift.paragraphs, *unknown])
    return [shift, _losses_section(variants, optima, label, config)]


def _enough(every, config: TransferConfig) -> tuple[dict, list[str]]:
    """The variants with two widths of three learning rates each, and why others are left out."""
    variants, missing = {}, []
    for name, curves in every.items():
        for width, points in curves.items():
            if len(points) < 3:
                missing.append(
                    f"{name} at --{config.width}={width:g} has {len(points)} learning rate(s), but "
                    "an optimum needs three"
                )
        usable = {width: points for width, points in curves.items() if len(points) >= 3}
        if len(usable) >= 2:
            variants[name] = usable
        else:
            missing.append(
                f"{name} has {len(usable)} usable value(s) of --{config.width}, but transfer needs "
                "two"
            )
    return variants, missing


def _curves(members: Sequence[Result], config: TransferConfig) -> dict[float, dict[float, float]]:
    """Width -> learning rate -> loss, both in increasing order, averaged over seeds."""
    scores: dict[float, dict[float, list[float]]] = {}
    for r in members:
        by_rate = scores.setdefault(flag_value("study.width", config.width, r), {})
        by_rate.setdefault(learning_rate(r), []).append(r.final(config.metric))
    return {
        width: {rate: float(np.mean(losses)) for rate, losses in sorted(points.items())}
        for width, points in sorted(scores.items())
    }


def _shift_section(optima: Mapping[str, Mapping[float, Optimum]], config) -> Section:
    rows, numbers, paragraphs = [], {}, []
    for name, widths in optima.items():
        first, last = min(widths), max(widths)
        for width, best in widths.items():
            rate = best.rate if math.isfinite(best.rate) else None
            rows.append((name, width, rate, best.loss))
            numbers[f"{name}/{width:g}/learning_rate"] = best.rate
            numbers[f"{name}/{width:g}/loss"] = best.loss
        known = {w: math.log2(o.rate) for w, o in widths.items() if math.isfinite(o.rate)}
        if len(known) < 2:
            paragraphs.append(
                f"{name}: too few optima lie inside the range of tried learning rates."
            )
            continue
        slope = float(np.polyfit(np.log2([*known]), [*known.values()], 1)[0])
        numbers[f"{name}/slope"] = slope
        text = f"{name}: the optimal learning rate scales as width^{slope:.2f}"
        if first in known and last in known:
            moved = known[last] - known[first]
            lost = widths[last].at(widths[first].rate) - widths[last].loss
            numbers |= {f"{name}/octaves": moved, f"{name}/lost": lost}
            text += (
                f"; from width {first:g} to {last:g} it moves by {moved:+.2f} octaves, and using "
                f"the narrow network's optimum for the wide one costs {lost:.4f} in {config.metric}"
            )
        paragraphs.append(text + ".")
    label = flag_label(config.width)
    columns = ("variant", label, "best learning rate", f"{config.metric} there")
    how = (
        "The optimum at a width is the minimum of the parabola through the lowest loss and its two "
        "neighbors, in the logarithm of the learning rate. A power of 0 means perfect transfer."
    )
    return Section(
        "Transfer", [how, *paragraphs], [Table("optima", columns, rows)],
        {"optima": _optima_figure(optima, config)}, numbers,
    )  # fmt: skip


def _unknown(variants, optima, config: TransferConfig) -> list[str]:
    """Which optima are not known, because the lowest loss has no two neighbors."""
    edges, beside = [], []
    for name, curves in variants.items():
        for width, points in curves.items():
            if math.isfinite(optima[name][width].rate):
                continue
            what = f"{name} at width {width:g}"
            edges.append((what, edge(points.items())))
            beside += [] if edges[-1][1] else [what]
    lines = sentences("learning rate", edges, f"lowest {config.metric}")
    if beside:
        lines.append(
            "The lowest loss is next to a learning rate that diverged, so that its optimum is not "
            f"known, for {', '.join(beside)}."
        )
    return lines


def _losses_section(variants, optima, label, config) -> Section:
    rows = [
        (name, width, rate, loss)
        for name, curves in variants.items()
        for width, points in curves.items()
        for rate, loss in points.items()
    ]
    columns = ("variant", flag_label(config.width), "learning rate", config.metric)
    figures = {
        f"losses_{file_name(name)}": _losses_figure(name, curves, optima[name], label)
        for name, curves in variants.items()
    }
    text = ["Crosses are the minima of the parabolas; diverged runs are not shown."]
    return Section("Loss against learning rate", text, [Table("losses", columns, rows)], figures)


def _losses_figure(name, curves, optima, label):
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    colors = colormaps["viridis"](np.linspace(0, 0.85, len(curves)))
    for color, (width, points) in zip(colors, curves.items(), strict=True):
        finite = [(rate, loss) for rate, loss in points.items() if math.isfinite(loss)]
        axes.plot(*zip(*finite, strict=True), marker="o", color=color, label=f"width {width:g}")
        if math.isfinite(optima[width].rate):
            axes.plot(
                optima[width].rate, optima[width].loss, "x", color=color, markersize=10, mew=2
            )
    axes.set(xlabel="learning rate", ylabel=label, title=name)
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _optima_figure(optima, config):
    from matplotlib.figure import Figure

    from genai_jax.scaling.log_axis import log_axes

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, widths in optima.items():
        known = [(w, o.rate) for w, o in widths.items() if math.isfinite(o.rate)]
        axes.plot([w for w, _ in known], [rate for _, rate in known], marker="o", label=name)
    axes.set(xlabel=flag_label(config.width), ylabel="best learning rate")
    widths = sorted({width for widths in optima.values() for width in widths})
    axes.set_xscale("log", base=2)
    axes.set_xticks(widths, [f"{width:g}" for width in widths])
    log_axes(axes, "y")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
