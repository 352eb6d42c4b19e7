"""What one sees of the figures in reports: labels, ticks, legends; and the width of the page."""

import functools
import math
import re

import numpy as np
import pytest
from matplotlib.figure import Figure

from genai_jax.scaling.fits.analysis import scaling_law
from genai_jax.scaling.fits.points import Curve
from genai_jax.scaling.log_axis import FEWEST, log_axes, ticks
from genai_jax.scaling.report_page import page
from genai_jax.scaling.report_types import Section, Table
from genai_jax.scaling.study import curves, transfer
from genai_jax.scaling.study.curves import CurvesConfig
from genai_jax.scaling.study.results import Result
from genai_jax.scaling.study.transfer import TransferConfig
from tests.scaling.study_results import make_run
from tests.scaling.test_fits import ladder, loss_of
from tests.scaling.test_study_transfer import swept


@functools.cache
def law_sections() -> list[Section]:
    points = ladder([1e18, 1e19, 1e20])
    sizes = np.geomspace(points.parameters.min(), points.parameters.max(), 8)
    tokens = np.geomspace(points.tokens.min(), points.tokens.max(), 30)
    training = [Curve(n, tokens, 6 * n * tokens, loss_of(n, tokens)) for n in sizes]
    held_out = points.flops > 5e19
    return scaling_law(points, held_out=held_out, curves=training, resamples=5)


def transfer_sections() -> list[Section]:
    best = {"a": {16: 2**-7.3, 32: 2**-8.3, 64: 2**-9.3}, "b": {16: 2**-8.4, 32: 2**-8.4}}
    return transfer.analyze(swept(best), TransferConfig("transfer"))


def curve_sections(panels: str) -> list[Section]:
    results = []
    for tokens in (100, 200, 1600):
        run = make_run(f"seen.{tokens}", data__unique_tokens=tokens)
        rows = [{"step": s, "eval/accuracy": s / tokens, "train/accuracy": 1.0} for s in (1, 2)]
        results.append(Result(run.name, run.config, run.counts, rows, False))
    config = CurvesConfig(
        "curves", metrics="eval/accuracy,train/accuracy", panels=panels,
        against="data.unique_tokens",
    )  # fmt: skip
    return curves.analyze(results, config)


SECTIONS = {
    "law": law_sections,
    "transfer": transfer_sections,
    "one run per figure": lambda: curve_sections("run"),
    "one metric per figure": lambda: curve_sections("metric"),
}


@pytest.mark.parametrize("sections", SECTIONS.values(), ids=SECTIONS)
def test_axes_are_named_in_words_and_have_ticks(sections):
    figures = {name: f for section in sections() for name, f in section.figures.items()}
    assert figures
    for name, figure in figures.items():
        figure.draw_without_rendering()
        panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
        assert panels[0].get_ylabel(), name
        for axes in panels:
            assert re.match(r"\w", axes.get_xlabel()), (name, axes.get_xlabel())
            for axis in (axes.xaxis, axes.yaxis):
                low, high = sorted(axis.get_view_interval())
                shown = [v for v in axis.get_majorticklocs() if low <= v <= high]
                assert len(shown) >= 3, name
            if axes.get_legend():
                assert len(axes.get_legend().get_texts()) > 1 or len(panels) > 1, name


def test_names_of_a_single_group_are_no_legend():
    (figure,) = [
        f for s in curve_sections("metric") for n, f in s.figures.items() if "eval_accuracy_ag" in n
    ]
    (axes,) = figure.axes
    assert axes.get_legend() is None
    assert axes.get_xlabel() == "unique tokens (--data.unique_tokens)"


def test_logarithmic_axes_have_enough_round_ticks():
    draws = np.random.default_rng(0)
    for _ in range(300):
        low, decades = 10 ** draws.uniform(-9, 21), draws.uniform(0.03, 3)
        found = ticks(low, low * 10**decades)
        assert FEWEST <= len(found) <= 12, (low, decades, found)
        assert all(low <= tick <= low * 10**decades for tick in found)


def test_contours_are_not_under_the_legend():
    figure = next(s.figures["law"] for s in law_sections() if "law" in s.figures)
    figure.draw_without_rendering()
    axes = next(a for a in figure.axes if a.get_title() == "predicted loss")
    boxes = [legend.get_window_extent() for legend in figure.legends]
    boxes += [axes.get_legend().get_window_extent()] if axes.get_legend() else []
    assert boxes and not any(box.overlaps(axes.get_window_extent()) for box in boxes)


def test_wide_parts_of_the_page_scroll_on_their_own():
    figure = Figure(figsize=(13, 4))
    log_axes(figure.subplots(), "x")
    columns = tuple(f"a column with a long name {i}" for i in range(12))
    table = Table("wide", columns, [tuple(math.pi * 10**i for i in range(12))])
    text = page("T", [Section("S", [], [table], {"f": figure})], {"environment": {"a": "b"}})
    assert '<meta name="viewport" content="width=device-width' in text
    begin = '<div class="wide" tabindex="0" role="region" aria-label="'
    for what in ("<table>", "<svg "):
        assert text.count(what) == len(re.findall(rf'{re.escape(begin)}\w+">{what}', text)) > 0
    assert ".wide { overflow-x: auto;" in text
    assert 'style="--width: 1248px"' in text  # text in it is as large as its font says
    assert "white-space: nowrap" not in re.search(r"nav a \{[^}]*\}", text)[0]
