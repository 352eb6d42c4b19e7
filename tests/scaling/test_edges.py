"""Best values at the edge of what was tried, and how every analysis says so."""

import math

import numpy as np
import pytest

from genai_jax.scaling.edges import edge, sentences, step_sentences
from genai_jax.scaling.fits import sections
from genai_jax.scaling.fits.all_laws import fit_all
from genai_jax.scaling.fits.points import Points, make_points
from tests.scaling.test_fits import best_size, ladder, loss_of


@pytest.mark.parametrize(
    ("points", "where"),
    [
        ([(1, 5), (2, 4), (3, 6)], ""),
        ([(2, 4), (1, 3), (3, 6)], "smallest"),
        ([(2, 4), (1, 5), (3, 3)], "largest"),
        ([(1, 5), (2, 5), (3, 6)], ""),  # the smallest is no better than the next
        ([(1, 5)], ""),
        ([(1, 5), (1, 4)], ""),  # two seeds
        ([(1, math.inf), (2, 3), (4, math.nan)], ""),
        ([(1, math.inf), (2, 3)], "largest"),
        ([(1, math.inf), (2, math.inf)], ""),
    ],
)
def test_the_edge_of_what_was_tried(points, where):
    assert edge(points) == where


def test_each_edge_has_one_sentence():
    edges = [("a", "smallest"), ("b", ""), ("c", "largest"), ("d", "largest")]
    small, large = sentences("width", edges, "lowest loss")
    assert small.endswith(
        "the lowest loss is at the smallest width for a; a smaller one may be better."
    )
    assert "largest width for c, d; a larger one" in large
    assert sentences("width", [("a", "")], "x") == step_sentences([]) == []


def test_the_metrics_of_a_large_study_are_grouped_and_few_runs_are_named():
    edges = [("loss", "a", "largest"), ("bits", "a", ""), ("loss", "b", "largest")]
    edges += [("bits", f"run{i}", "largest") for i in range(9)] + [("bits", "c", "smallest")]
    last, first = step_sentences(edges)
    assert last.endswith(
        "improve it: loss of a, b; bits of run0, run1, run2, run3, and 5 more runs."
    )
    assert first.endswith("ever after: bits of c.")
    five = [("loss", f"run{i}", "largest") for i in range(5)]
    assert step_sentences(five)[0].endswith("run3, run4.")  # the name is as short as "1 more"
    (many,) = step_sentences([(f"m{i}", "a", "largest") for i in range(50)])
    assert many.endswith("m3 of a; and 46 more metrics.")


@pytest.mark.parametrize(
    ("factor", "end", "beyond"), [(8, "smallest", "smaller"), (1 / 8, "largest", "larger")]
)
def test_budgets_without_a_minimum_are_named_with_the_side(factor, end, beyond):
    """Every size of the last budget is on one side of the best one."""
    inside = ladder([1e18, 1e19, 1e20])
    sizes = best_size(1e21) * factor * np.array([0.5, 1, 2])
    off = make_points(sizes, 1e21 / 6 / sizes, loss_of(sizes, 1e21 / 6 / sizes))
    points = Points(*(np.concatenate(pair) for pair in zip(inside, off, strict=True)))
    said = f"minimum of the parabola is at the {end} size N for 1e+21 FLOPs; a {beyond} one"
    fits = fit_all(points, None, 0, 0)
    assert said in sections.isoflop(fits, "nats").paragraphs[-1]
    # Also where too few budgets have a minimum for a fit.
    paragraphs = sections.isoflop(fits._replace(isoflop="none", points=off), "nats").paragraphs
    assert paragraphs[0] == "Not fitted: none." and said in paragraphs[1]
