"""Scaling-law studies: the points that runs contribute to the fits."""

import math

import pytest

from genai_jax.config import ConfigError
from genai_jax.scaling.report_types import Section
from genai_jax.scaling.study import scaling_law
from genai_jax.scaling.study.folder import Run
from genai_jax.scaling.study.scaling_law import ScalingLawConfig
from tests.scaling.study_results import COUNTS, STEPS, make_result, make_run

LAW = ScalingLawConfig(
    "scaling_law", held_out="n30000_d4096,n10000_d4096", resamples=0, budgets="1e8"
)


def grid() -> list[tuple[Run, float]]:
    """Runs and their losses, 1.5 + 20 / N^0.4 + 60 / D^0.4."""
    pairs = []
    for n in (1e3, 3e3, 1e4, 3e4):
        for per_step in (64, 256, 1024, 4096):
            counts = COUNTS._replace(
                parameters=int(n) + 256, embedding_parameters=256, active=int(n),
                tokens_per_step=per_step, flops_per_step=6 * n * per_step,
            )  # fmt: skip
            loss = 1.5 + 20 / n**0.4 + 60 / (per_step * STEPS) ** 0.4
            pairs.append((make_run(f"n{n:g}_d{per_step}", counts=counts), loss))
    return pairs


def test_a_scaling_law_gets_the_points_of_the_runs():
    scaling_law.check([run for run, _ in grid()], LAW)
    sections = scaling_law.analyze([make_result(*pair) for pair in grid()], LAW)
    numbers = {name: value for s in sections for name, value in s.numbers.items()}
    for name, value in {"E": 1.5, "A": 20, "B": 60, "alpha": 0.4, "beta": 0.4}.items():
        assert numbers[f"parametric/{name}"] == pytest.approx(value, rel=1e-3)
    assert numbers["held_out/parametric/max_relative_error"] < 1e-3


def test_runs_that_diverged_or_have_no_curve_do_not_affect_the_others(monkeypatch):
    """Also: holding out a population holds out all of its members."""
    seen = {}

    def fits(points, *, held_out, curves, **_):
        seen.update(points=points, held_out=held_out, curves=curves)
        return [Section("Law", ["as fitted"])]

    monkeypatch.setattr("genai_jax.scaling.fits.analysis.scaling_law", fits)
    runs = [make_run(name) for name in ("a", "b", "big/0", "big/1", "bad")]
    rows = [{"step": step, "eval/loss": 9.0 - step} for step in (2, 4, 8)]
    results = [make_result(run, 1.0)._replace(rows=rows[k == 1 :]) for k, run in enumerate(runs)]
    results[-1] = make_result(runs[-1], math.inf)
    config = ScalingLawConfig("scaling_law", held_out="big")
    (section,) = scaling_law.analyze(results, config)
    assert section.paragraphs == ["Left out because the loss is not finite: bad.", "as fitted"]
    assert seen["held_out"].tolist() == [False, False, True, True]
    assert [len(curve.loss) for curve in seen["curves"]] == [3]
    with pytest.raises(ConfigError, match="every run diverged: bad"):
        scaling_law.analyze(results[-1:], ScalingLawConfig("scaling_law"))


def test_studies_that_cannot_be_fitted_are_refused_before_training():
    runs = [run for run, _ in grid()]
    for kept, changes, words in (
        (runs, {"held_out": "c"}, r"--study.held_out=c matches no run .* are n1000_d64, n1"),
        (runs, {"held_out": "*"}, "leaves no runs to fit"),
        (
            runs[:6],
            {},
            r"the parametric law needs at least as many points as its 5 coefficients, not 4",
        ),
        (runs[:10], {"held_out": "n10000*"}, "at least 3 different parameters, but there are 2"),
        (runs, {"budgets": "1e10"}, r"--study.budgets=1e\+10 is outside .*extrapolate=1.7"),
    ):
        default = {"held_out": "n1000_d64,n1000_d256"}
        with pytest.raises(ConfigError, match=words):
            scaling_law.check(kept, ScalingLawConfig("scaling_law", **default | changes))
