"""What studies conclude, on results that are made up so that the answer is known."""

import io
import json
import math
import os
import pathlib

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from genai_jax.components import parse_run
from genai_jax.config import ConfigError
from genai_jax.scaling.report import Section
from genai_jax.scaling.study import comparison, curves, scaling_law, session, transfer
from genai_jax.scaling.study.analyses import ANALYSES
from genai_jax.scaling.study.comparability import ComparisonConfig
from genai_jax.scaling.study.cores import core_shares
from genai_jax.scaling.study.curves import CurvesConfig
from genai_jax.scaling.study.expected import off, read_expected
from genai_jax.scaling.study.folder import Counts, Run
from genai_jax.scaling.study.launch import commands
from genai_jax.scaling.study.results import Fate, Result, is_finished, read_results, write_fate
from genai_jax.scaling.study.runs import Outcome
from genai_jax.scaling.study.scaling_law import ScalingLawConfig
from genai_jax.scaling.study.table import LiveTable
from genai_jax.scaling.study.times import Measured, Speed, _fitted, makespan
from genai_jax.scaling.study.transfer import TransferConfig
from tests.commands import TINY
from tests.conftest import ROOT

COUNTS = Counts(
    parameters=1000, embedding_parameters=200, active=1000, tokens_per_step=256,
    flops_per_step=1e6, convention="as told", loss_unit="nats per token",
)  # fmt: skip
STEPS = 8


BASE = parse_run([*TINY, f"--train.steps={STEPS}"])


def made(name: str, folder: pathlib.Path | None = None, counts: Counts = COUNTS, **flags) -> Run:
    """A run of the tiny model with some flags changed, named component__field."""
    config = BASE
    for flag, value in flags.items():
        component, field = flag.split("__")
        config = config.replace(component, **{field: value})
    folder = folder or pathlib.Path("nowhere")
    return Run(name, folder / f"{name}.flags", folder, config, counts)


def result(run: Run, loss: float, **more) -> Result:
    row = {"step": STEPS, "eval/loss": loss} | more
    return Result(run.name, run.config, run.counts, [row], not math.isfinite(loss))


# Comparison

SEEDS = (1, 2, 3)
NOISE = {0: -0.7, 1: 0.3, 2: -0.1, 3: 0.05}  # of a seed, the same for all: pairing removes it
EFFECT = {"plain": 0.0, "better": -0.2, "same": 0.001}
JITTER = {1: 0.010, 2: -0.012, 3: 0.004}  # what pairing leaves


def compared(rates=(1e-3, 3e-3)) -> list[Run]:
    return [
        made(f"{name}.lr{rate}.s{seed}", run__seed=seed, optimizer__learning_rate=rate)
        for name in EFFECT
        for rate in rates
        for seed in (0, *SEEDS)
    ]


def score(run: Run) -> Result:
    """The second rate is better; with the selection seed by a lucky margin."""
    name, seed = run.name.split(".")[0], run.config.run.seed
    loss = 3 + EFFECT[name] + NOISE[seed]
    loss += 0.5 if run.config.optimizer.learning_rate == 1e-3 else 0.0
    loss += JITTER.get(seed, 0.0) * (1 if name == "better" else 3 if name == "same" else 0)
    return result(run, loss)


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
        # Of the scored seeds alone, whose noise is not that of the selection seed.
        mean = 3 + values.mean() + np.mean([NOISE[seed] for seed in SEEDS])
        assert numbers[f"{name}/eval/loss"] == pytest.approx(mean, abs=1e-12)
        assert numbers[f"{name}/learning_rate"] == 3e-3
    verdicts = {row[0]: row[7] for row in sections[0].tables[0].rows}
    assert verdicts == {"plain": "is the baseline", "better": "better", "same": "not told apart"}
    assert sections[0].tables[0].rows[0][0] == "better"  # sorted
    rates = sections[2].tables[0].rows
    assert len(rates) == 6 and sum(row[3] == "chosen" for row in rates) == 3
    assert "At the edge" in sections[2].paragraphs[1]


def test_bootstrap_intervals_hold_the_mean(runs):
    needed = [r for r in runs if r.config.run.seed == 0 or r.config.optimizer.learning_rate == 3e-3]
    numbers = comparison.analyze(
        [score(r) for r in needed], settings(interval="bootstrap")
    )[0].numbers  # fmt: skip
    low, mean, high = (numbers[f"better/difference{end}"] for end in ("_low", "", "_high"))
    values = [EFFECT["better"] + JITTER[seed] for seed in SEEDS]
    assert min(values) - 1e-12 <= low < mean < high <= max(values) + 1e-12


def test_what_is_missing_is_named(runs):
    scored = [score(r) for r in runs if r.config.run.seed in SEEDS]
    with pytest.raises(ConfigError, match=r"plain has no finished run with --study.selection"):
        comparison.analyze(scored, settings())
    with pytest.raises(ConfigError, match=r"no run of --study.baseline=plain is finished"):
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


def test_a_diverged_seed_is_no_crash():
    one_rate = compared(rates=(3e-3,))
    scored = [score(r) for r in one_rate if r.config.run.seed]
    scored = [r._replace(diverged=r.name.startswith("same") or r.diverged) for r in scored]
    section = comparison.analyze(scored, settings())[0]
    assert section.numbers["same/eval/loss"] == math.inf
    assert section.numbers["better/difference"] == pytest.approx(-0.2, abs=0.01)


@pytest.mark.parametrize(
    ("changes", "counts", "words"),
    [
        ({"baseline": "gone"}, COUNTS, "baseline=gone is no architecture .* plain, better, same"),
        ({"seeds": 4}, COUNTS, r"plain has 3 scored seed\(s\) .*seeds=4 are needed"),
        ({"selection_seed": 9}, COUNTS, "no run with learning rate 0.001 and .*selection_seed=9"),
        ({}, COUNTS._replace(flops_per_step=1.2e6), r"not matched: 9.6e\+06 flops against .* \+20"),
        (
            {"match": "parameters"},
            COUNTS._replace(parameters=900),
            "not matched: 900 parameters against 1000",
        ),
        ({}, COUNTS._replace(tokens_per_step=128), "sees other tokens .*: 1024 and 2048"),
        ({"notes": "x: y"}, COUNTS, "--study.notes: x is no architecture"),
    ],
)
def test_studies_that_cannot_compare_are_refused(runs, changes, counts, words):
    changed = [r._replace(counts=counts) if r.name.startswith("same") else r for r in runs]
    with pytest.raises(ConfigError, match=words):
        comparison.needed(changed, {}, settings(**changes))


def test_other_data_is_refused_and_how_it_is_read_is_not(runs):
    changed = lambda **flags: [
        r._replace(config=r.config.replace("data", **flags)) if r.name.startswith("same") else r
        for r in runs
    ]
    with pytest.raises(ConfigError, match=r"sees other --data.validation_percent .*: 20 and 5"):
        comparison.needed(changed(validation_percent=20), {}, settings())
    assert comparison.needed(changed(validation_percent=20), {}, settings(same_data=False))
    assert comparison.needed(changed(prefetch=7), {}, settings())


def test_within_the_tolerance_is_matched(runs):
    counts = COUNTS._replace(flops_per_step=1.04e6)
    changed = [r._replace(counts=counts) if r.name.startswith("same") else r for r in runs]
    assert comparison.needed(changed, {}, settings())
    needed = [r for r in changed if r.config.run.seed == 0 or "0.003" in r.name]
    section = comparison.analyze([score(r) for r in needed], settings())[1]
    assert {row[0]: row[-1] for row in section.tables[0].rows}["same"] == pytest.approx(4)


# Transfer


def swept(best: dict[str, dict[int, float]]) -> list[Result]:
    """Losses 2 + (log2 rate - log2 best)^2 / 10 at five rates for every variant and width."""
    found = []
    for variant, widths in best.items():
        for width, optimum in widths.items():
            for power in range(-12, -5):
                rate = 2.0**power
                loss = 2 + (power - math.log2(optimum)) ** 2 / 10
                name = f"{variant}.w{width}.{power}"
                flags = {"transformer__embed_dim": width, "optimizer__learning_rate": rate}
                found.append(result(made(name, **flags), loss))
    return found


def test_the_optimum_of_a_parabola_is_found_exactly():
    best = {
        "standard": {16: 2**-7.3, 32: 2**-8.3, 64: 2**-9.3},
        "mup": {16: 2**-8.4, 32: 2**-8.4, 64: 2**-8.4},
    }
    config = TransferConfig("transfer")
    numbers = transfer.analyze(swept(best), config)[0].numbers
    for variant, widths in best.items():
        for width, rate in widths.items():
            assert numbers[f"{variant}/{width}/learning_rate"] == pytest.approx(rate, rel=1e-9)
            assert numbers[f"{variant}/{width}/loss"] == pytest.approx(2, abs=1e-9)
    assert numbers["standard/slope"] == pytest.approx(-1, abs=1e-9)
    assert numbers["standard/octaves"] == pytest.approx(-2, abs=1e-9)
    assert numbers["standard/lost"] == pytest.approx(0.4, abs=1e-9)
    assert numbers["mup/slope"] == pytest.approx(0, abs=1e-9)


def test_an_optimum_at_the_edge_or_beside_a_divergence_is_none():
    assert math.isnan(transfer.optimum([1, 2, 4], [1.0, 2.0, 3.0]).rate)
    assert math.isnan(transfer.optimum([1, 2, 4], [2.0, 1.0, math.inf]).rate)
    assert transfer.optimum([1, 2, 4, 8], [2.0, 1.0, 2.0, math.inf]).rate == pytest.approx(2)


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (lambda r: ".w16." in r.name, r"has 1 value\(s\) of --transformer.embed_dim"),
        (lambda r: ".w16." in r.name or r.name.endswith(("-7", "-8")), r"has 2 learning rate\(s\)"),
    ],
)
def test_too_little_for_transfer_is_refused(keep, words):
    results = [r for r in swept({"mup": {16: 2**-8, 32: 2**-8}}) if keep(r)]
    with pytest.raises(ConfigError, match=words):
        transfer.analyze(results, TransferConfig("transfer"))
    with pytest.raises(ConfigError, match=r"--study.width=a.b is no flag of run"):
        transfer.analyze(results, TransferConfig("transfer", width="a.b"))


# Curves


def grokked() -> list[Result]:
    """Training accuracy arrives at step 20, that of held-out problems at step 40."""
    found = []
    for decay in (0.0, 1.0):
        run = made(f"grok.{decay}", optimizer__weight_decay=decay)
        rows = [
            {
                "step": step,
                "train/accuracy": min(1.0, step / 20),
                "eval/accuracy": min(1.0, step / 40) * decay,
                "eval/loss": abs(step - 30) / 10,
            }
            for step in range(10, 60, 10)
        ]
        found.append(Result(run.name, run.config, run.counts, rows, False))
    return found


def test_curves_say_when_a_metric_is_reached():
    config = CurvesConfig(
        "curves", metrics="train/accuracy,eval/accuracy,eval/loss", reach=0.95,
        against="optimizer.weight_decay",
    )  # fmt: skip
    drawn, values, against = curves.analyze(grokked(), config)
    assert set(drawn.figures) == {"train_accuracy", "eval_accuracy", "eval_loss"}
    numbers = values.numbers
    assert numbers["grok.1.0/train/accuracy/reached"] == 20
    assert numbers["grok.1.0/eval/accuracy/reached"] == 40
    assert math.isnan(numbers["grok.0.0/eval/accuracy/reached"])
    assert numbers["grok.1.0/eval/loss/best"] == 0 and numbers["grok.1.0/eval/loss"] == 2
    assert numbers["grok.1.0/eval/loss/reached"] == 30  # at most, for a loss
    assert values.tables[0].columns[-1] == "first step at 0.95"
    assert ("grok.1.0", "eval/accuracy", 1.0, 1.0, 40, 40) in values.tables[0].rows
    assert ("eval/accuracy", "grok", 1.0, 1.0, 1) in against.tables[0].rows
    config = CurvesConfig("curves", metrics="eval/loss", panels="run", over="tokens")
    by_run = curves.analyze(grokked(), config)
    assert set(by_run[0].figures) == {"grok.0.0", "grok.1.0"}


def test_members_that_differ_in_the_seed_alone_make_one_line():
    one = grokked()[0]
    rows = [{"step": s, "eval/loss": s / 10} for s in (10, 20)]
    seeds = [
        one._replace(name=f"grok.1.0/{k}", config=one.config.replace("run", seed=k), rows=r)
        for k, r in enumerate((rows, [{"step": 10, "eval/loss": 3.0}, {"step": 20}]))
    ]  # the second diverged after step 10
    config = CurvesConfig("curves", metrics="eval/loss", against="parameters")
    drawn, values, against = curves.analyze(seeds, config)
    assert values.tables[0].rows == [("grok.1.0", "eval/loss", 2.0, 2.0, 10)]
    assert against.tables[0].rows == [("eval/loss", "grok", one.counts.parameters, 2.0, 2)]
    assert len(drawn.figures["eval_loss"].axes[0].lines) == 3  # the mean and each seed
    rates = [s._replace(config=s.config.replace("optimizer", learning_rate=10.0**-k))
             for k, s in enumerate(seeds)]  # fmt: skip
    assert [line.name for line in curves.lines_of(rates)] == ["grok.1.0/0", "grok.1.0/1"]


def test_a_metric_or_flag_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="no run has eval/x; there are eval/accuracy"):
        curves.analyze(grokked(), CurvesConfig("curves", metrics="eval/x"))
    runs = [made("one")]
    for analysis, given, says in (
        ("curves", CurvesConfig("curves", against="nope"), "is no flag of run one.*none of param"),
        ("transfer", TransferConfig("transfer", width="nope"), "study.width=nope is no flag"),
    ):  # before anything is trained
        with pytest.raises(ConfigError, match=says):
            ANALYSES[analysis].needed(runs, {}, given)
    config = CurvesConfig("curves", metrics="eval/loss", against="optimizer.name")
    with pytest.raises(ConfigError, match=r"--study.against=optimizer.name is 'adamw' in run"):
        curves.analyze(grokked(), config)


# Scaling laws


LAW = ScalingLawConfig(
    "scaling_law", held_out="n30000_d4096,n10000_d4096", resamples=0, budgets="1e8"
)


def grid() -> list[tuple[Run, float]]:
    """Runs and their losses, 1.5 + 20 / N^0.4 + 60 / D^0.4."""
    found = []
    for n in (1e3, 3e3, 1e4, 3e4):
        for per_step in (64, 256, 1024, 4096):
            counts = COUNTS._replace(
                parameters=int(n) + 256, embedding_parameters=256, active=int(n),
                tokens_per_step=per_step, flops_per_step=6 * n * per_step,
            )  # fmt: skip
            loss = 1.5 + 20 / n**0.4 + 60 / (per_step * STEPS) ** 0.4
            found.append((made(f"n{n:g}_d{per_step}", counts=counts), loss))
    return found


def test_a_scaling_law_gets_the_points_of_the_runs():
    scaling_law.check([run for run, _ in grid()], LAW)
    sections = scaling_law.analyze([result(*pair) for pair in grid()], LAW)
    numbers = {name: value for s in sections for name, value in s.numbers.items()}
    for name, value in {"E": 1.5, "A": 20, "B": 60, "alpha": 0.4, "beta": 0.4}.items():
        assert numbers[f"parametric/{name}"] == pytest.approx(value, rel=1e-3)
    assert numbers["held_out/parametric/max_relative_error"] < 1e-3


def test_a_diverged_run_and_one_without_a_curve_do_not_stop_the_others(monkeypatch):
    """And a held-out population hides all of its members."""
    seen = {}

    def fits(points, *, held_out, curves, **_):
        seen.update(points=points, held_out=held_out, curves=curves)
        return [Section("Law", ["as fitted"])]

    monkeypatch.setattr("genai_jax.scaling.fits.analysis.scaling_law", fits)
    runs = [made(name) for name in ("a", "b", "big/0", "big/1", "bad")]
    rows = [{"step": step, "eval/loss": 9.0 - step} for step in (2, 4, 8)]
    results = [result(run, 1.0)._replace(rows=rows[k == 1 :]) for k, run in enumerate(runs)]
    results[-1] = result(runs[-1], math.inf)
    config = ScalingLawConfig("scaling_law", held_out="big")
    (section,) = scaling_law.analyze(results, config)
    assert section.paragraphs == ["Left out, their loss is not finite: bad.", "as fitted"]
    assert seen["held_out"].tolist() == [False, False, True, True]
    assert [len(curve.loss) for curve in seen["curves"]] == [3]
    with pytest.raises(ConfigError, match="every run diverged: bad"):
        scaling_law.analyze(results[-1:], ScalingLawConfig("scaling_law"))


def test_what_no_law_could_be_fitted_to_is_said_before_anything_is_trained():
    runs = [run for run, _ in grid()]
    for kept, changes, words in (
        (runs, {"held_out": "c"}, r"--study.held_out=c is no run of the study; .* n1000_d64, n1"),
        (runs, {"held_out": "*"}, "leaves no run to fit"),
        (runs[:6], {}, r"the parametric law has 5 coefficients; 4 points"),
        (runs[:10], {"held_out": "n10000*"}, "at least 3 different parameters; there are 2"),
        (runs, {"budgets": "1e10"}, r"--study.budgets=1e\+10 is outside of .*extrapolate=1.7"),
    ):
        default = {"held_out": "n1000_d64,n1000_d256"}
        with pytest.raises(ConfigError, match=words):
            scaling_law.check(kept, ScalingLawConfig("scaling_law", **default | changes))


# Results


def test_a_process_that_ends_well_and_leaves_its_run_unfinished_is_not_started_for_ever(
    monkeypatch, tmp_path
):
    run = made("a", tmp_path)
    monkeypatch.setattr(session, "state_of", lambda *_: session.State([run], [run], {}))
    monkeypatch.setattr(session, "execute", lambda *_, **__: Outcome({}, 0))
    monkeypatch.setattr(session, "make_display", lambda *_: None)
    outcome = session.train_missing(None, CurvesConfig("curves"), ["a"], 1, None)
    assert outcome.failed == {"a": "its process ended well, and yet the run is not finished"}


def test_a_system_that_does_not_tell_its_cores_leaves_them_to_it(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    assert core_shares(3) == [frozenset()] * 3


def test_members_of_a_population_are_models_of_their_own(tmp_path):
    run = made("both", tmp_path, population__size=3, population__learning_rates="1e-3,2e-3,4e-3")
    rows = [
        {"step": 4, "eval/loss": 2.5, "eval/loss/0": 3.0, "eval/loss/1": 2.0, "eval/loss/2": 9.0},
        {"step": STEPS, "eval/loss": 2.0, "eval/loss/0": 2.5, "eval/loss/1": 1.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "flags.txt").write_text(run.config.to_flags())
    assert is_finished(run, False)
    first, second, third = read_results(run)
    assert [r.name for r in (first, second, third)] == ["both/0", "both/1", "both/2"]
    assert second.config.optimizer.learning_rate == 2e-3
    assert (first.final("eval/loss"), second.final("eval/loss")) == (2.5, 1.5)
    assert third.diverged and third.final("eval/loss") == math.inf
    assert third.curve("eval/loss") == ([4], [9.0])
    assert first.flops == COUNTS.flops_per_step * STEPS and run.flops == 3 * first.flops


def test_a_divergence_is_a_result_where_it_may_be(tmp_path):
    run = made("hot", tmp_path)
    rows = [{"step": 2, "train/loss": 5.0}]
    (tmp_path / "metrics.jsonl").write_text(json.dumps(rows[0]) + "\n")
    (tmp_path / "flags.txt").write_text(run.config.to_flags())
    write_fate(run, Fate(2, "loss is nan at step 3; none is saved before", 1.0, 0))
    assert is_finished(run, True) and not is_finished(run, False)
    assert read_results(run)[0].final("eval/loss") == math.inf
    write_fate(run, Fate(2, "text:/x: no such file or folder", 1.0, 0))
    assert not is_finished(run, True)


def test_expected_numbers(tmp_path):
    write = lambda text: (tmp_path / "expected.json").write_text(text)
    with pytest.raises(ConfigError, match=r"expected.json is not there"):
        read_expected(tmp_path)
    write('{"a": {"value": 2, "tolerance": 0.5}, "b": {"value": -10, "tolerance": "10%"}}')
    expected = read_expected(tmp_path)
    assert expected == {"a": (2, 0.5), "b": (-10, 1)}
    assert off({"a": 2.5, "b": -9.0}, expected) == []
    wrong = off({"a": math.nan, "b": -8.9}, expected)
    assert len(wrong) == 2 and wrong[1] == "b is -8.9; expected is -10 within 1"
    for text in ('{"a": 3}', '{"a": {"value": 1, "tolerance": "x%"}}', '{"a": {"value": 1}}'):
        write(text)
        with pytest.raises(ConfigError, match=r"a is .*; allowed is"):
            read_expected(tmp_path)
    write("{")
    with pytest.raises(ConfigError, match="is no JSON"):
        read_expected(tmp_path)


def test_times_are_overhead_and_rate(tmp_path):
    found = [Measured(f, 0.01 + f / 2e9, 20.0) for f in (1e7, 1e8, 4e8)]
    speed = _fitted(found, "x")
    assert speed[:3] == pytest.approx((20.0, 0.01, 2e9), rel=1e-6)
    run = made("a", tmp_path)
    assert speed.seconds(run) == pytest.approx(20 + STEPS * (0.01 + 1e6 / 2e9))
    assert _fitted(found[:1], "x") == Speed(20.0, 0.0, pytest.approx(1e7 / 0.015), "x")
    assert makespan([5, 4, 3, 3], 2) == 8 and makespan([5, 4, 3, 3], 1) == 15


def test_a_slurm_job_for_each_run(tmp_path):
    run = made("a b", tmp_path)._replace(flagfile=ROOT / "experiments/quickstart/vae.flags")
    (line,) = commands("slurm", "--nodes=2 --partition=gpu", [run])
    assert line == (
        "experiments/pods/launch/slurm.sh --nodes=2 --partition=gpu "
        f"--flagfile=experiments/quickstart/vae.flags --workdir={tmp_path}"
    )


def test_the_live_table_shows_every_run(tmp_path):
    console = Console(width=110, height=30, record=True, file=io.StringIO())
    runs = [made(name, tmp_path / name) for name in ("done", "going", "broken", "next")]
    for run in runs[:2]:
        run.workdir.mkdir()
        row = {"step": 4, "eval/loss": 2.5, "perf/tokens_per_second": 1234.0}
        (run.workdir / "metrics.jsonl").write_text(json.dumps(row) + '\n{"step": 6, "cut')
    table = LiveTable(runs, runs[:1], "eval/loss", console)
    with table:
        table.started(runs[1])
        table.started(runs[2])
        table.ended(runs[2], Fate(2, "no such file", 1.0, 0))
        table.interrupted(1, 1)
    console.print(table.table())
    lines = {line.split()[0]: line for line in console.export_text().splitlines() if line.strip()}
    assert "4/8" in lines["done"] and "2.5000" in lines["done"] and "1,234" in lines["going"]
    assert lines["going"].rstrip().endswith("running")
    assert "failed: no such file" in lines["broken"] and "waiting" in lines["next"]
    assert "stopping: 1 run(s) save a checkpoint" in " ".join(lines.values())
