"""Reading the results of a study's runs, checking them, estimating times, displaying progress."""

import io
import json
import math
import os

import pytest
from rich.console import Console

from genai_jax.config import ConfigError
from genai_jax.scaling.study import session
from genai_jax.scaling.study.cores import core_shares
from genai_jax.scaling.study.curves import CurvesConfig
from genai_jax.scaling.study.expected import off, read_expected
from genai_jax.scaling.study.launch import commands
from genai_jax.scaling.study.results import Fate, is_finished, read_results, write_fate
from genai_jax.scaling.study.runs import Outcome
from genai_jax.scaling.study.table import LiveTable
from genai_jax.scaling.study.times import Measured, Speed, _fitted, makespan
from tests.conftest import ROOT
from tests.scaling.study_results import COUNTS, STEPS, make_run


def test_a_process_that_succeeds_without_finishing_its_run_is_not_restarted_forever(
    monkeypatch, tmp_path
):
    run = make_run("a", tmp_path)
    monkeypatch.setattr(session, "state_of", lambda *_: session.State([run], [run], {}))
    monkeypatch.setattr(session, "execute", lambda *_, **__: Outcome({}, 0))
    monkeypatch.setattr(session, "make_display", lambda *_: None)
    outcome = session.train_missing(None, CurvesConfig("curves"), ["a"], 1, None, None)
    assert outcome.failed == {"a": "its process exited without an error, but the run is incomplete"}


def test_affinity_is_left_alone_where_the_system_does_not_report_its_cores(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    assert core_shares(3) == [frozenset()] * 3


def test_members_of_a_population_are_separate_models(tmp_path):
    run = make_run(
        "both", tmp_path, population__size=3, population__learning_rates="1e-3,2e-3,4e-3"
    )
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


def test_a_divergence_can_count_as_a_result(tmp_path):
    run = make_run("hot", tmp_path)
    rows = [{"step": 2, "train/loss": 5.0}]
    (tmp_path / "metrics.jsonl").write_text(json.dumps(rows[0]) + "\n")
    (tmp_path / "flags.txt").write_text(run.config.to_flags())
    write_fate(run, Fate(2, "loss is nan at step 3; no checkpoint is before it", 1.0, 0))
    assert is_finished(run, True) and not is_finished(run, False)
    assert read_results(run)[0].final("eval/loss") == math.inf
    write_fate(run, Fate(2, "text:/x: no such file or folder", 1.0, 0))
    assert not is_finished(run, True)


def test_expected_numbers(tmp_path):
    write = lambda text: (tmp_path / "expected.json").write_text(text)
    with pytest.raises(ConfigError, match=r"expected.json does not exist"):
        read_expected(tmp_path)
    write('{"a": {"value": 2, "tolerance": 0.5}, "b": {"value": -10, "tolerance": "10%"}}')
    expected = read_expected(tmp_path)
    assert expected == {"a": (2, 0.5), "b": (-10, 1)}
    assert off({"a": 2.5, "b": -9.0}, expected) == []
    deviations = off({"a": math.nan, "b": -8.9}, expected)
    assert len(deviations) == 2 and deviations[1] == "b is -8.9; expected -10 within 1"
    for text in ('{"a": 3}', '{"a": {"value": 1, "tolerance": "x%"}}', '{"a": {"value": 1}}'):
        write(text)
        with pytest.raises(ConfigError, match=r"a is .*; write {"):
            read_expected(tmp_path)
    write("{")
    with pytest.raises(ConfigError, match="is not valid JSON"):
        read_expected(tmp_path)


def test_times_are_overhead_and_rate(tmp_path):
    times = [Measured(f, 0.01 + f / 2e9, 20.0) for f in (1e7, 1e8, 4e8)]
    speed = _fitted(times, "x")
    assert speed[:3] == pytest.approx((20.0, 0.01, 2e9), rel=1e-6)
    run = make_run("a", tmp_path)
    assert speed.seconds(run) == pytest.approx(20 + STEPS * (0.01 + 1e6 / 2e9))
    assert _fitted(times[:1], "x") == Speed(20.0, 0.0, pytest.approx(1e7 / 0.015), "x")
    assert makespan([5, 4, 3, 3], 2) == 8 and makespan([5, 4, 3, 3], 1) == 15


def test_a_slurm_job_for_each_run(tmp_path):
    run = make_run("a b", tmp_path)._replace(flagfile=ROOT / "experiments/quickstart/vae.flags")
    (line,) = commands("slurm", "--nodes=2 --partition=gpu", [run])
    assert line == (
        "experiments/pods/launch/slurm.sh --nodes=2 --partition=gpu "
        f"--flagfile=experiments/quickstart/vae.flags --workdir={tmp_path}"
    )


def test_the_live_table_shows_every_run(tmp_path):
    console = Console(width=110, height=30, record=True, file=io.StringIO())
    runs = [make_run(name, tmp_path / name) for name in ("done", "going", "broken", "next")]
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
