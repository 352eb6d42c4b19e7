"""The sections of a comparison's report: differences, matched quantities, learning rates.

Matplotlib is imported where a figure is drawn, so that commands start without it.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from genai_jax.config import ConfigError
from genai_jax.scaling.edges import edge, sentences
from genai_jax.scaling.report_types import Section, Table
from genai_jax.scaling.study.comparability import ComparisonConfig, matched
from genai_jax.scaling.study.curves import legend
from genai_jax.scaling.study.groups import label_of, learning_rate, seed
from genai_jax.scaling.study.pairing import LEVEL, RESAMPLES, Difference
from genai_jax.scaling.study.settings import names

COLORS = 10  # of lines in matplotlib's default cycle


def main_section(scored, rates, differences, references, missing, config) -> Section:
    rows, numbers, notes = [], {}, config.parsed_notes()
    also, members = names(config.also), scored | references
    values_of = {
        name: np.array([r.final(config.metric) for r in results], np.float64)
        for name, results in members.items()
    }
    base = float(np.mean(values_of[config.baseline]))
    for name in sorted(members, key=lambda name: float(np.mean(values_of[name]))):
        values = values_of[name]
        mean, difference = float(np.mean(values)), differences.get(name)
        numbers[f"{name}/{config.metric}"] = mean
        if name in references:
            difference = Difference(mean - base, None, None, 0)
            numbers[f"{name}/difference"] = difference.mean
        else:
            numbers[f"{name}/learning_rate"] = rates[name]
        if name in differences:
            numbers |= {
                f"{name}/difference": difference.mean,
                f"{name}/difference_low": difference.low,
                f"{name}/difference_high": difference.high,
            }
        others = [_mean(members[name], metric, name in references) for metric in also]
        rows.append(
            (
                name, mean, _spread(values), len(values),
                *(difference[:3] if difference else (None, None, None)),
                _verdict(difference), *others, rates.get(name), notes.get(name),
            )
        )  # fmt: skip
    columns = (
        "architecture", config.metric, "deviation", "seeds", "difference", "low", "high",
        "against the baseline", *also, "learning rate", "note",
    )  # fmt: skip
    how = {
        "t": "from Student's t distribution over paired seeds",
        "bootstrap": f"from {RESAMPLES:,} bootstrap resamples of the paired seeds",
    }[config.interval]
    order = " (and thus the same data in the same order)" if config.same_data else ""
    label = label_of(scored[config.baseline][0], config.metric)
    text = (
        f"Mean {label} over seeds at the last step (lower is better), its standard deviation over "
        f"seeds, and the mean difference to {config.baseline} with the same seed{order}. The "
        f"{LEVEL:.0%} confidence intervals are {how}; they are not corrected for the number of "
        f"comparisons ({len(differences)})."
    )
    drop = [i for i, c in enumerate(columns) if c == "note" and not notes]
    keep = lambda row: tuple(cell for i, cell in enumerate(row) if i not in drop)
    table = Table("comparison", keep(columns), [keep(row) for row in rows])
    figures = {"differences": _differences_figure(differences, label, config)}
    more = [f"Left out: {reason}." for reason in missing]
    if references:
        more.insert(
            0, f"Not matched, and without an interval: {', '.join(references)} "
            "(--study.references).",
        )  # fmt: skip
    return Section("Comparison", [text, *more], [table], figures, numbers)


def _mean(results, metric: str, is_reference: bool) -> float | None:
    """Mean of a metric, which a reference may lack."""
    try:
        return float(np.mean([r.final(metric) for r in results]))
    except ConfigError:
        if is_reference:
            return None
        raise


def _spread(values: np.ndarray) -> float | None:
    """Standard deviation; None of a single value."""
    if len(values) < 2:
        return None
    return float(np.std(values, ddof=1)) if np.all(np.isfinite(values)) else math.nan


def _verdict(difference: Difference | None) -> str:
    if difference is None:
        return "is the baseline"
    if difference.low is None:
        return "is not matched"
    if difference.high < 0:
        return "better"
    return "worse" if difference.low > 0 else "no clear difference"


def matching_section(scored, config) -> Section:
    base = scored[config.baseline][0]
    rows = []
    for name, members in scored.items():
        first = members[0]
        off = matched(first, config) / matched(base, config) - 1
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
    data = (
        "the same data and the same number of tokens or examples"
        if config.same_data
        else "the data that their flagfiles name"
    )
    text = (
        f"All architectures are trained on {data}, and their {config.match} agree with the "
        f"baseline's to within {config.tolerance:.1%}. FLOPs: {base.counts.convention}."
    )
    return Section("Matched quantities", [text], [Table("matching", columns, rows)])


def rates_section(architectures, rates, config) -> Section:
    """Every learning rate that was tried with the selection seed."""
    rows, edges, metric = [], [], config.selects_by
    for name, members in architectures.items():
        tried = [r for r in members if seed(r) == config.selection_seed]
        if len({learning_rate(r) for r in tried}) < 2:
            continue
        ordered = sorted(tried, key=learning_rate)
        edges.append((name, edge((learning_rate(r), r.final(metric)) for r in ordered)))
        for r in ordered:
            mark = "chosen" if learning_rate(r) == rates[name] else None
            rows.append((name, learning_rate(r), r.final(metric), mark))
    if not rows:
        return Section("Learning rates", ["Every architecture has a single learning rate."])
    paragraphs = [
        "Each architecture uses the learning rate that is best with seed "
        f"{config.selection_seed} at the same budget; that seed is not part of the scores above.",
        *sentences("learning rate", edges, f"best {metric}"),
    ]
    columns = ("architecture", "learning rate", metric, "")
    label = label_of(architectures[config.baseline][0], metric)
    figures = {"learning_rates": _rates_figure(rows, label)}
    return Section("Learning rates", paragraphs, [Table("learning_rates", columns, rows)], figures)


def _differences_figure(
    differences: Mapping[str, Difference], label: str, config: ComparisonConfig
):
    from matplotlib.figure import Figure

    finite = {name: d for name, d in differences.items() if math.isfinite(d.mean)}
    ordered = sorted(finite.items(), key=lambda item: -item[1].mean)
    figure = Figure(figsize=(7, 1.4 + 0.4 * len(ordered)), layout="constrained")
    axes = figure.subplots()
    means = [d.mean for _, d in ordered]
    spans = [[d.mean - d.low for _, d in ordered], [d.high - d.mean for _, d in ordered]]
    axes.errorbar(means, range(len(ordered)), xerr=spans, fmt="o", capsize=4)
    axes.set_yticks(range(len(ordered)), [name for name, _ in ordered])
    axes.set_ylim(-0.6, len(ordered) - 0.4)
    axes.axvline(0, color="gray", lw=1)
    axes.set_xlabel(f"difference to {config.baseline}, {label}, with {LEVEL:.0%} interval")
    axes.grid(alpha=0.3, axis="x")
    return figure


def _rates_figure(rows: Sequence[tuple], label: str):
    from matplotlib.figure import Figure

    from genai_jax.scaling.log_axis import log_axes

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(dict.fromkeys(row[0] for row in rows)):
        own = [row for row in rows if row[0] == name and math.isfinite(row[2])]
        marker = "osv^D"[i // COLORS % 5]  # the colors come again
        axes.plot([row[1] for row in own], [row[2] for row in own], marker=marker, label=name)
    axes.set(xlabel="learning rate", ylabel=label)
    log_axes(axes, "x")
    axes.grid(alpha=0.3)
    legend(figure, axes, len(axes.lines))
    return figure
