"""Figures of the fits, created without pyplot, which would keep them alive."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from genai_jax.scaling.fits.envelope import Envelope
from genai_jax.scaling.fits.fit import Fit
from genai_jax.scaling.fits.isoflop import IsoFlop
from genai_jax.scaling.fits.optimum import Cost, Optimum, optimum
from genai_jax.scaling.fits.points import Curve, Points
from genai_jax.scaling.fits.power_law import KaplanLaw
from genai_jax.scaling.log_axis import log_axes

SIZE, TOKENS, FLOPS = "parameters N", "tokens D", "training FLOPs C"
COLORS = "viridis"
LINE, HIDDEN = "#c2410c", "#be123c"


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(5.2 * count if count < 3 else 13, 4.2), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for each in axes:
        each.grid(alpha=0.25, linewidth=0.6)
    return figure, list(axes)


def _colors(figure: Figure, axes: Axes, values: np.ndarray, label: str) -> ScalarMappable:
    """A color scale for the logarithm of `values`, with a color bar next to the axes."""
    low, high = values.min(), values.max()
    colors = ScalarMappable(LogNorm(low, high if high > low else 2 * low), COLORS)
    figure.colorbar(colors, ax=axes, label=label)
    return colors


def law(points: Points, hidden: Points, fit: Fit, cost: Cost, unit: str) -> Figure:
    """Loss over compute with the law's optimum, and contours of the law over N and D."""
    figure, (left, right) = _panels(2)
    _runs_over_compute(figure, left, points, hidden, unit)
    reach = np.concatenate([points.flops, hidden.flops])
    budgets = np.geomspace(reach.min(), reach.max(), 60)
    best = _best(fit, cost, budgets)
    if best:
        left.plot(budgets, [b.loss.value for b in best], color=LINE, label="law: compute-optimal")
        left.legend()
    _contours(right, points, hidden, fit)
    if best:
        line = [b.parameters.value for b in best], [b.tokens.value for b in best]
        limits = right.axis()
        right.plot(*line, color=LINE, label="law: compute-optimal")
        right.axis(limits)
    # Below the axes, where it hides no label of a contour.
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, fontsize="small")
    return figure


def _best(fit: Fit, cost: Cost, budgets: np.ndarray) -> list[Optimum]:
    try:
        plain = fit._replace(samples=fit.samples[:0])
        return [optimum(plain, cost, budget) for budget in budgets]
    except ValueError:  # the law has no optimum, as its section says
        return []


def _runs_over_compute(figure: Figure, axes: Axes, points: Points, hidden: Points, unit: str):
    colors = _colors(figure, axes, points.parameters, SIZE)
    axes.scatter(points.flops, points.loss, color=colors.to_rgba(points.parameters), s=16, zorder=3)
    if len(hidden.loss):
        axes.scatter(hidden.flops, hidden.loss, s=26, facecolors="none", edgecolors=HIDDEN,
                     label="held out", zorder=3)  # fmt: skip
    axes.set(xlabel=FLOPS, ylabel=f"loss ({unit})", title="runs")
    log_axes(axes, "x", "y")


def _contours(axes: Axes, points: Points, hidden: Points, fit: Fit):
    sizes = np.concatenate([points.parameters, hidden.parameters])
    tokens = np.concatenate([points.tokens, hidden.tokens])
    span = lambda values: np.geomspace(values.min() / 1.3, values.max() * 1.3, 80)
    n, d = np.meshgrid(span(sizes), span(tokens))
    loss = fit.loss(n.ravel(), d.ravel()).reshape(n.shape)
    contours = axes.contour(n, d, loss, levels=14, cmap="cividis_r", linewidths=0.9)
    axes.clabel(contours, fontsize=7, fmt="%.3g")
    axes.scatter(points.parameters, points.tokens, s=9, color="#444", label="runs", zorder=3)
    if len(hidden.loss):
        axes.scatter(hidden.parameters, hidden.tokens, s=26, facecolors="none",
                     edgecolors=HIDDEN, label="held out", zorder=3)  # fmt: skip
    axes.set(xlabel=SIZE, ylabel=TOKENS, title="predicted loss")
    log_axes(axes, "x", "y")


def residuals(points: Points, hidden: Points, fit: Fit, unit: str) -> Figure:
    """Residuals of the law over N, D and the predicted loss."""
    figure, panels = _panels(3)
    for runs, style, label in (
        (points, dict(color="#2563a8", s=14), "fitted"),
        (hidden, dict(facecolors="none", edgecolors=HIDDEN, s=26), "held out"),
    ):
        if not len(runs.loss):
            continue
        predicted = fit.loss(runs.parameters, runs.tokens)
        residual = 100 * (runs.loss / predicted - 1)
        for axes, x in zip(panels, (runs.parameters, runs.tokens, predicted), strict=True):
            axes.scatter(x, residual, label=label, zorder=3, **style)
    for axes, label in zip(panels, (SIZE, TOKENS, f"predicted loss ({unit})"), strict=True):
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(xlabel=label)
        log_axes(axes, "x")
    panels[0].set(ylabel="residual (% of predicted loss)")
    panels[0].legend(fontsize="small")
    return figure


def single(points: Points, laws: dict[str, KaplanLaw], unit: str) -> Figure:
    """Frontiers, and lines of the laws of one variable."""
    figure, panels = _panels(len(laws))
    data = {
        "N": (points.parameters, SIZE),
        "D": (points.tokens, TOKENS),
        "C": (points.flops, FLOPS),
    }
    for axes, (of, law) in zip(panels, laws.items(), strict=True):
        x, label = data[of]
        axes.scatter(x, points.loss, s=8, color="#b8bec4", label="runs")
        axes.scatter(law.x, law.loss, s=20, color="#2563a8", label="frontier", zorder=3)
        span = np.geomspace(law.x.min(), law.x.max(), 50)
        axes.plot(span, law.line(span), color=LINE, label=f"alpha = {law.alpha:.3g}")
        axes.set(xlabel=label)
        axes.legend(fontsize="small")
        log_axes(axes, "x", "y")
    panels[0].set(ylabel=f"loss ({unit})")
    return figure


def isoflop(points: Points, fit: IsoFlop, unit: str) -> Figure:
    """The parabolas with their minima, and the power laws fitted to these."""
    figure, (left, right) = _panels(2)
    colors = _colors(figure, left, np.array([v.budget for v in fit.valleys]), "FLOPs")
    for valley in fit.valleys:
        here, shade = points.where(valley.runs), colors.to_rgba(valley.budget)
        left.scatter(here.parameters, here.loss, s=14, color=shade)
        span = np.linspace(*np.log([here.parameters.min(), here.parameters.max()]), 60)
        left.plot(np.exp(span), np.polyval(valley.parabola[::-1], span), color=shade, linewidth=1)
        if valley.inside:
            left.scatter(valley.parameters, valley.loss, marker="x", color=LINE, zorder=4)
    left.set(xlabel=SIZE, ylabel=f"loss ({unit})", title="runs by budget")
    log_axes(left, "x")
    inside = [v for v in fit.valleys if v.inside]
    budget = np.array([v.budget for v in inside])
    for name, line, color in (("N", fit.parameters, "#2563a8"), ("D", fit.tokens, "#15803d")):
        values = [v.parameters if name == "N" else v.tokens for v in inside]
        right.scatter(budget, values, s=18, color=color)
        label = f"{name} ~ C^{line.power:.3g}"
        right.plot(budget, line(budget), color=color, label=label, linewidth=1.2)
    right.set(xlabel=FLOPS, ylabel="N and D at the minimum", title="minima")
    right.legend()
    log_axes(right, "x", "y")
    return figure


def envelope(curves: list[Curve], fit: Envelope, unit: str) -> Figure:
    """The training curves with their envelope, and the sizes on it."""
    figure, (left, right) = _panels(2)
    colors = _colors(figure, left, np.array([curve.parameters for curve in curves]), SIZE)
    for curve in curves:
        left.plot(curve.flops, curve.loss, color=colors.to_rgba(curve.parameters), linewidth=0.9)
    left.plot(fit.budget, fit.loss, color=LINE, linewidth=0, marker=".", markersize=2,
              label="best run, not the smallest or largest")  # fmt: skip
    left.set(xlabel=FLOPS, ylabel=f"loss ({unit})", title="training curves")
    left.legend(fontsize="small", markerscale=4)
    log_axes(left, "x", "y")
    for name, values, line, color in (
        ("N", fit.parameters, fit.parameters_law, "#2563a8"),
        ("D", fit.tokens, fit.tokens_law, "#15803d"),
    ):
        right.plot(fit.budget, values, ".", color=color, markersize=2)
        right.plot(fit.budget, line(fit.budget), color=color, linewidth=1.2,
                   label=f"{name} ~ C^{line.power:.3g}")  # fmt: skip
    right.set(xlabel=FLOPS, ylabel="N and D of the best run")
    right.legend()
    log_axes(right, "x", "y")
    return figure


def optima(approaches: dict[str, list[Optimum]]) -> Figure:
    """Optimal sizes and tokens over budgets by each approach, with their intervals."""
    figure, panels = _panels(2)
    markers = dict(zip(approaches, "osD", strict=False))
    for i, (name, best_runs) in enumerate(approaches.items()):
        budget = np.array([best.budget for best in best_runs]) * 1.04**i  # avoids overlap
        for axes, field in zip(panels, ("parameters", "tokens"), strict=True):
            value, low, high = np.array([getattr(best, field) for best in best_runs]).T
            arms = np.nan_to_num(np.maximum([value - low, high - value], 0))
            axes.errorbar(budget, value, arms, label=name, marker=markers[name], markersize=4,
                          linewidth=0.8, capsize=2)  # fmt: skip
    for axes, label in zip(panels, (SIZE, TOKENS), strict=True):
        axes.set(xlabel="budget (FLOPs)", ylabel=f"optimal {label}")
        axes.legend()
        log_axes(axes, "x", "y")
    return figure


def held_out(points: Points, hidden: Points, fit: Fit, unit: str) -> Figure:
    """Predicted loss against measured loss."""
    figure, (axes,) = _panels(1)
    for runs, color, label in ((points, "#b8bec4", "fitted"), (hidden, HIDDEN, "held out")):
        predicted = fit.loss(runs.parameters, runs.tokens)
        axes.scatter(runs.loss, predicted, s=18, color=color, label=label, zorder=3)
    ends = np.array([min(points.loss.min(), hidden.loss.min()), points.loss.max()])
    axes.plot(ends, ends, color="black", linewidth=0.8)
    axes.fill_between(ends, ends * 0.98, ends * 1.02, color="black", alpha=0.08, label="±2%")
    axes.set(xlabel=f"measured loss ({unit})", ylabel=f"predicted loss ({unit})")
    axes.legend()
    return figure
