"""The sections of a comparison in the report: differences, what is matched, learning rates."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from genai_jax.scaling.report_types import Section, Table
from genai_jax.scaling.study.comparability import ComparisonConfig, matched
from genai_jax.scaling.study.curves import legend
from genai_jax.scaling.study.groups import label_of, learning_rate, seed
from genai_jax.scaling.study.pairing import LEVEL, RESAMPLES, Difference
from genai_jax.scaling.study.settings import names


def main_section(scored, scores, rates, differences, missing, config) -> Section:
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
    data = "the same data, as many tokens" if config.same_data else "the data of their flagfiles"
    text = (
        f"All see {data}, and are matched by {config.match} within {config.tolerance:.1%}. "
        f"FLOPs: {base.counts.convention}."
    )
    return Section("What is matched", [text], [Table("matching", columns, rows)])


def rates_section(architectures, rates, config) -> Section:
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
