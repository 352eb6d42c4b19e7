"""Comparison studies: scores paired by seed, and what makes runs comparable."""

import math

import numpy as np
import pytest
from scipy import stats

from genai_jax.config import ConfigError
from genai_jax.scaling.study import comparison
from genai_jax.scaling.study.comparability import ComparisonConfig
from genai_jax.scaling.study.folder import Run
from genai_jax.scaling.study.results import Result
from tests.scaling.study_results import COUNTS, make_result, make_run

SEEDS = (1, 2, 3)
NOISE = {0: -0.7, 1: 0.3, 2: -0.1, 3: 0.05}  # effect of a seed on all: pairing removes it
EFFECT = {"plain": 0.0, "better": -0.2, "same": 0.001}
JITTER = {1: 0.010, 2: -0.012, 3: 0.004}  # what remains after pairing


def compared(rates=(1e-3, 3e-3)) -> list[Run]:
    return [
        make_run(f"{name}.lr{rate}.s{seed}", run__seed=seed, optimizer__learning_rate=rate)
        for name in EFFECT
        for rate in rates
        for seed in (0, *SEEDS)
    ]


def score(run: Run) -> Result:
    """The second learning rate is better, and the selection seed is especially lucky."""
    name, seed = run.name.split(".")[0], run.config.run.seed
    loss = 3 + EFFECT[name] + NOISE[seed]
    loss += 0.5 if run.config.optimizer.learning_rate == 1e-3 else 0.0
    loss += JITTER.get(seed, 0.0) * (1 if name == "better" else 3 if name == "same" else 0)
    return make_result(run, loss)


@pytest.fixture(scope="module")
def runs():
    return compared()


def settings(**changes) -> ComparisonConfig:
    return ComparisonConfig(**{"analysis": "comparison", "baseline": "plain"} | changes)


def test_rates_are_chosen_before_the_other_seeds_are_run(runs):
    first = comparison.needed(runs, {}, settings())
    assert {run.config.run.seed for run in first} == {0} and len(first) == 6
    finished = {run.name: [score(run)] for run in first}
    second = comparison.needed(runs, finished, settings())
    more = [run for run in second if run.name not in finished]
    assert {run.config.optimizer.learning_rate for run in more} == {3e-3} and len(more) == 9


@pytest.mark.smoke
def test_differences_are_paired_and_the_choice_is_not_scored(runs):
    needed = [r for r in runs if r.config.run.seed == 0 or r.config.optimizer.learning_rate == 3e-3]
    sections = comparison.analyze([score(run) for run in needed], settings())
    numbers = sections[0].numbers
    for name in ("better", "same"):
        scale = {"better": 1, "same": 3}[name]
        values = np.array([EFFECT[name] + scale * JITTER[seed] for seed in SEEDS])
        interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert numbers[f"{name}/difference"] == pytest.approx(values.mean(), abs=1e-12)
        assert numbers[f"{name}/difference_low"] == pytest.approx(interval.low, abs=1e-12)
        assert numbers[f"{name}/difference_high"] == pytest.approx(interval.high, abs=1e-12)
        # The mean over the scored seeds only, without the noise of the selection seed.
        mean = 3 + values.mean() + np.mean([NOISE[seed] for seed in SEEDS])
        assert numbers[f"{name}/eval/loss"] == pytest.approx(mean, abs=1e-12)
        assert numbers[f"{name}/learning_rate"] == 3e-3
    verdicts = {row[0]: row[7] for row in sections[0].tables[0].rows}
    expected = {"plain": "is the baseline", "better": "better", "same": "no clear difference"}
    assert verdicts == expected
    assert sections[0].tables[0].rows[0][0] == "better"  # sorted
    rates = sections[2].tables[0].rows
    assert len(rates) == 6 and sum(row[3] == "chosen" for row in rates) == 3
    assert sections[2].paragraphs[1].startswith("At the edge of the tried range: the best eval/l")


def test_references_are_listed_without_a_match(runs):
    other = [make_run(f"counts{n}", run__seed=0) for n in (2, 3)]
    other = [run._replace(counts=COUNTS._replace(flops_per_step=1.0)) for run in other]
    with pytest.raises(ConfigError, match="relative to"):
        comparison.needed(runs + other, {}, settings())
    config = settings(references="counts*")
    needed = comparison.needed(runs + other, {}, config)
    assert {run.name for run in other} < {run.name for run in needed}
    best = [r for r in runs if r.config.optimizer.learning_rate == 3e-3]
    alone = comparison.analyze([score(run) for run in best], config)[0]
    both = comparison.analyze(
        [*(score(run) for run in best), *(make_result(run, 4.0) for run in other)], config
    )[0]
    plain = both.numbers["plain/eval/loss"]
    assert both.numbers["counts2/difference"] == pytest.approx(4.0 - plain)
    assert "counts2/difference_low" not in both.numbers
    assert alone.numbers.items() <= both.numbers.items()
    row = {r[0]: r for r in both.tables[0].rows}["counts3"]
    assert row[2:4] == (None, 1) and "is not matched" in row
    assert any("Not matched" in text and "counts2, counts3" in text for text in both.paragraphs)


def test_another_metric_may_choose_the_rate(runs):
    """By a score that falls with the rate, the other of the two is chosen."""

    def scored(run):
        result, rate = score(run), run.config.optimizer.learning_rate
        rows = [row | {"eval/other": rate} for row in result.rows]
        return result._replace(rows=rows)

    config = settings(selection_metric="eval/other")
    finished = {run.name: [scored(run)] for run in comparison.needed(runs, {}, config)}
    second = comparison.needed(runs, finished, config)
    more = [run for run in second if run.name not in finished]
    assert {run.config.optimizer.learning_rate for run in more} == {1e-3}
    found = comparison.analyze([scored(run) for run in second], config)
    assert found[0].numbers["plain/learning_rate"] == 1e-3
    assert found[2].tables[0].columns[2] == "eval/other"


@pytest.mark.parametrize(
    ("references", "words"), [("other", "no architecture of the study"), ("pl*", "baseline=plain")]
)
def test_references_that_cannot_be_are_refused(runs, references, words):
    with pytest.raises(ConfigError, match=words):
        comparison.needed(runs, {}, settings(references=references))


def test_bootstrap_intervals_hold_the_mean(runs):
    needed = [r for r in runs if r.config.run.seed == 0 or r.config.optimizer.learning_rate == 3e-3]
    numbers = comparison.analyze(
        [score(r) for r in needed], settings(interval="bootstrap")
    )[0].numbers  # fmt: skip
    low, mean, high = (numbers[f"better/difference{end}"] for end in ("_low", "", "_high"))
    values = [EFFECT["better"] + JITTER[seed] for seed in SEEDS]
    assert min(values) - 1e-12 <= low < mean < high <= max(values) + 1e-12


def test_missing_runs_are_named(runs):
    scored = [score(r) for r in runs if r.config.run.seed in SEEDS]
    with pytest.raises(ConfigError, match=r"plain has no finished run with --study.selection"):
        comparison.analyze(scored, settings())
    with pytest.raises(ConfigError, match=r"no run of --study.baseline=plain has finished"):
        comparison.analyze([r for r in scored if not r.name.startswith("plain")], settings())
    fewer = [r for r in map(score, compared(rates=(3e-3,))) if r.config.run.seed != 2]
    with pytest.raises(ConfigError, match=r"better and plain have 3 .*seeds=4 are needed"):
        comparison.analyze(fewer, settings(seeds=4))


def test_an_architecture_whose_runs_failed_is_left_out(runs):
    scored = [score(r) for r in compared(rates=(3e-3,)) if r.config.run.seed]
    kept = [r for r in scored if not r.name.startswith("same") or r.config.run.seed == 1]
    section, matching, _ = comparison.analyze(kept, settings())
    assert section.numbers["better/difference"] == pytest.approx(-0.2, abs=0.01)
    assert "same and plain have 1 scored seed(s)" in section.paragraphs[1]
    assert {row[0] for row in matching.tables[0].rows} == {"plain", "better"}


def test_a_diverged_seed_does_not_crash():
    one_rate = compared(rates=(3e-3,))
    scored = [score(r) for r in one_rate if r.config.run.seed]
    scored = [r._replace(diverged=r.name.startswith("same") or r.diverged) for r in scored]
    section = comparison.analyze(scored, settings())[0]
    assert section.numbers["same/eval/loss"] == math.inf
    assert section.numbers["better/difference"] == pytest.approx(-0.2, abs=0.01)


@pytest.mark.parametrize(
    ("changes", "counts", "words"),
    [
        (
            {"baseline": "gone"},
            COUNTS,
            "baseline=gone is not an architecture .* plain, better, same",
        ),
        ({"seeds": 4}, COUNTS, r"plain has 3 scored seed\(s\) .*seeds=4 are needed"),
        ({"selection_seed": 9}, COUNTS, "no run with learning rate 0.001 and .*selection_seed=9"),
        ({}, COUNTS._replace(flops_per_step=1.2e6), r"has 9.6e\+06 flops, \+20.0% relative to the"),
        (
            {"match": "parameters"},
            COUNTS._replace(parameters=900),
            "has 900 parameters, -10.0% relative to the 1000 of",
        ),
        ({}, COUNTS._replace(tokens_per_step=128), "differ in tokens .*: 1024 and 2048"),
        ({"notes": "x: y"}, COUNTS, "--study.notes: x is not an architecture"),
    ],
)
def test_incomparable_studies_are_refused(runs, changes, counts, words):
    changed = [r._replace(counts=counts) if r.name.startswith("same") else r for r in runs]
    with pytest.raises(ConfigError, match=words):
        comparison.needed(changed, {}, settings(**changes))


def test_different_data_is_refused_but_not_different_loading(runs):
    changed = lambda **flags: [
        r._replace(config=r.config.replace("data", **flags)) if r.name.startswith("same") else r
        for r in runs
    ]
    with pytest.raises(ConfigError, match=r"differ in --data.validation_percent: 20 and 5"):
        comparison.needed(changed(validation_percent=20), {}, settings())
    assert comparison.needed(changed(validation_percent=20), {}, settings(same_data=False))
    assert comparison.needed(changed(prefetch=7), {}, settings())


def test_small_differences_are_tolerated(runs):
    counts = COUNTS._replace(flops_per_step=1.04e6)
    changed = [r._replace(counts=counts) if r.name.startswith("same") else r for r in runs]
    assert comparison.needed(changed, {}, settings())
    needed = [r for r in changed if r.config.run.seed == 0 or "0.003" in r.name]
    section = comparison.analyze([score(r) for r in needed], settings())[1]
    assert {row[0]: row[-1] for row in section.tables[0].rows}["same"] == pytest.approx(4)
