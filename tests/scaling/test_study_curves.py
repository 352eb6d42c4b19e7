"""Curve studies: metrics over training and against a flag."""

import math

import pytest

from genai_jax.config import ConfigError
from genai_jax.scaling.study import curves
from genai_jax.scaling.study.analyses import ANALYSES
from genai_jax.scaling.study.curves import CurvesConfig
from genai_jax.scaling.study.results import Result
from genai_jax.scaling.study.transfer import TransferConfig
from tests.scaling.study_results import make_run


def grokked() -> list[Result]:
    """Training accuracy reaches 1 at step 20, held-out accuracy at step 40 with weight decay."""
    results = []
    for decay in (0.0, 1.0):
        run = make_run(f"grok.{decay}", optimizer__weight_decay=decay)
        rows = [
            {
                "step": step,
                "train/accuracy": min(1.0, step / 20),
                "eval/accuracy": min(1.0, step / 40) * decay,
                "eval/loss": abs(step - 30) / 10,
            }
            for step in range(10, 60, 10)
        ]
        results.append(Result(run.name, run.config, run.counts, rows, False))
    return results


def test_what_is_best_at_the_first_or_the_last_step_is_said():
    run = make_run("a")
    rows = [{"step": s, "eval/loss": 1 / s, "eval/accuracy": 1 / s} for s in (1, 2, 3)]
    results = [Result(run.name, run.config, run.counts, rows, False)]
    config = CurvesConfig("curves", metrics="eval/loss,eval/accuracy")
    assert curves.analyze(results, config)[1].paragraphs[1:] == [
        "Still best at the last step, so that more steps may improve it: eval/loss of a.",
        "Best at the first logged step, and worse ever after: eval/accuracy of a.",
    ]


def test_curves_report_when_a_metric_reaches_the_threshold():
    config = CurvesConfig(
        "curves", metrics="train/accuracy,eval/accuracy,eval/loss", reach=0.95,
        against="optimizer.weight_decay",
    )  # fmt: skip
    curve_section, values, against = curves.analyze(grokked(), config)
    assert set(curve_section.figures) == {"train_accuracy", "eval_accuracy", "eval_loss"}
    numbers = values.numbers
    assert numbers["grok.1.0/train/accuracy/reached"] == 20
    assert numbers["grok.1.0/eval/accuracy/reached"] == 40
    assert math.isnan(numbers["grok.0.0/eval/accuracy/reached"])
    assert numbers["grok.1.0/eval/loss/best"] == 0 and numbers["grok.1.0/eval/loss"] == 2
    assert numbers["grok.1.0/eval/loss/reached"] == 30  # at most, for a loss
    assert len(values.paragraphs) == 1  # nothing is best at the first or the last step
    assert against.paragraphs[1:] == [
        "At the edge of the tried range: the best eval/accuracy is at the largest weight decay "
        "(--optimizer.weight_decay) for grok; a larger one may be better."
    ]
    assert values.tables[0].columns[-1] == "first step at 0.95"
    assert ("grok.1.0", "eval/accuracy", 1.0, 1.0, 40, 40) in values.tables[0].rows
    assert ("eval/accuracy", "grok", 1.0, 1.0, 1) in against.tables[0].rows
    config = CurvesConfig("curves", metrics="eval/loss", panels="run", over="tokens")
    by_run = curves.analyze(grokked(), config)
    assert set(by_run[0].figures) == {"grok.0.0", "grok.1.0"}


def test_members_that_differ_only_in_their_seed_share_a_line():
    one = grokked()[0]
    rows = [{"step": s, "eval/loss": s / 10} for s in (10, 20)]
    seeds = [
        one._replace(name=f"grok.1.0/{k}", config=one.config.replace("run", seed=k), rows=r)
        for k, r in enumerate((rows, [{"step": 10, "eval/loss": 3.0}, {"step": 20}]))
    ]  # the second diverged after step 10
    config = CurvesConfig("curves", metrics="eval/loss", against="parameters")
    curve_section, values, against = curves.analyze(seeds, config)
    assert values.tables[0].rows == [("grok.1.0", "eval/loss", 2.0, 2.0, 10)]
    assert against.tables[0].rows == [("eval/loss", "grok", one.counts.parameters, 2.0, 2)]
    assert len(curve_section.figures["eval_loss"].axes[0].lines) == 3  # the mean and each seed
    rates = [s._replace(config=s.config.replace("optimizer", learning_rate=10.0**-k))
             for k, s in enumerate(seeds)]  # fmt: skip
    assert [line.name for line in curves.lines_of(rates)] == ["grok.1.0/0", "grok.1.0/1"]


def test_an_unknown_metric_or_flag_is_named():
    with pytest.raises(ConfigError, match="no run has eval/x; the metrics are eval/accuracy"):
        curves.analyze(grokked(), CurvesConfig("curves", metrics="eval/x"))
    runs = [make_run("one")]
    for analysis, given, says in (
        (
            "curves",
            CurvesConfig("curves", against="nope"),
            "neither a flag of run one.*nor one of param",
        ),
        ("transfer", TransferConfig("transfer", width="nope"), "study.width=nope is not a flag"),
    ):  # before anything is trained
        with pytest.raises(ConfigError, match=says):
            ANALYSES[analysis].needed(runs, {}, given)
    config = CurvesConfig("curves", metrics="eval/loss", against="optimizer.name")
    with pytest.raises(ConfigError, match=r"--study.against=optimizer.name is 'adamw' in run"):
        curves.analyze(grokked(), config)
