"""A study as a user runs it: interrupted and resumed, with a failing run, checked and launched."""

import json
import re
import signal
import time

import pytest

from genai_jax import study
from genai_jax.components import make_task, parse_run
from genai_jax.config import ConfigError
from genai_jax.scaling.study.folder import read_study
from genai_jax.scaling.study.session import State
from genai_jax.scaling.study.times import Speed
from tests.commands import TINY, run, start

STEPS = 800  # of the run that is interrupted: a second or more


def write_study(folder, base: tuple[str, ...], runs: dict[str, tuple[str, ...]], *settings: str):
    """Writes the files of a study; the runs include the base."""
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text("# A tiny study\n\n**Question.** Do seeds\nmatter?\n\nYes.\n")
    (folder / "base.flags").write_text("\n".join(base) + "\n")
    (folder / "study.flags").write_text("\n".join(settings) + "\n")
    for name, flags in runs.items():
        lines = ["--flagfile=base.flags", *flags]
        (folder / f"{name}.flags").write_text("\n".join(lines) + "\n")
    return folder


def rows(workdir) -> list[dict]:
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(what):
    until = time.time() + 240
    while not what():
        assert time.time() < until
        time.sleep(0.05)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, text_folder):
    """(study, workdir): a run of a second or more, and one whose data does not exist."""
    base = (
        *TINY, f"--data.dataset=text:{text_folder}", "--optimizer.schedule=rsqrt",
        "--transformer.dropout=0.1", "--ema.decay=0.9", "--train.log_every=10",
        f"--train.steps={STEPS}", "--checkpoint.every=0",
    )  # fmt: skip
    runs = {"sound": ("--seed=1",), "broken": ("--data.dataset=text:/nowhere",)}
    settings = ("--study.analysis=curves", "--study.metrics=eval/loss")
    folder = write_study(tmp_path_factory.mktemp("studies") / "tiny", base, runs, *settings)
    return folder, tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def done(folders):
    """The study run twice, two runs at a time: first interrupted, then to completion."""
    folder, workdir = folders
    flags = (f"--study={folder}", f"--workdir={workdir}", "--jobs=2")
    process = start("study", *flags, "--only=sound")
    wait_for((workdir / "runs" / "sound").exists)
    with pytest.raises(ConfigError, match=r"is in use by process .*, a study in this folder"):
        study.main(flags)
    wait_for(lambda: rows(workdir / "runs" / "sound"))
    process.send_signal(signal.SIGINT)
    _, first = process.communicate(timeout=240)
    stopped_at = rows(workdir / "runs" / "sound")[-1]["step"]
    code = process.returncode
    out, second = run("study", *flags, code=1)
    return code, first, stopped_at, out, second


def test_ctrl_c_is_passed_on_and_the_command_to_resume_is_printed(done, folders):
    code, said, stopped_at, *_ = done
    assert code == 130 and stopped_at < STEPS
    assert "run(s) save a checkpoint and exit; a second signal ends them immediately" in said
    assert "sound: stopped, checkpoint saved" in said
    assert f"to resume: python -m genai_jax.study --study={folders[0]}" in said
    log = (folders[1] / "runs" / "sound" / "train.log").read_text()
    assert "stopped by signal 2 at step" in log


def test_the_same_command_resumes(done, folders):
    *_, said = done
    sound = folders[1] / "runs" / "sound"
    assert "sound: resumed at step" in said
    assert "resuming" in (sound / "train.log").read_text()
    assert [row["step"] for row in rows(sound)] == list(range(10, STEPS + 1, 10))
    assert "eval/loss" in rows(sound)[-1]


def test_a_failed_run_is_reported_and_does_not_affect_the_rest(done, folders):
    *_, out, said = done
    assert "broken failed: --data.dataset=text:/nowhere: no such file or folder" in said
    assert f"report: {folders[1] / 'report' / 'index.html'}" in out
    page = (folders[1] / "report" / "index.html").read_text()
    assert "broken is missing: --data.dataset=text:/nowhere: no such file or folder" in page
    assert "A tiny study" in page and "Do seeds matter?" in page
    results = json.loads((folders[1] / "report" / "results.json").read_text())
    last = rows(folders[1] / "runs" / "sound")[-1]
    assert results["numbers"]["sound/eval/loss"] == last["eval/loss"]
    assert results["record"]["environment"]["versions"]["jax"]
    assert "--seed=1\n" in results["record"]["flags"]["sound"]


def test_finished_runs_are_not_touched_and_can_be_checked(done, folders, capsys):
    folder, workdir = folders
    before = {
        p: p.stat().st_mtime_ns for p in (workdir / "runs").rglob("*") if "broken" not in str(p)
    }
    flags = [f"--study={folder}", f"--workdir={workdir}", "--only=sound", "--check"]
    loss = rows(workdir / "runs" / "sound")[-1]["eval/loss"]
    expected = {"sound/eval/loss": {"value": loss * 1.01, "tolerance": "2%"}}
    (folder / "expected.json").write_text(json.dumps(expected))
    assert study.main(flags) == 0
    assert "every number agrees with expected.json" in capsys.readouterr().out
    expected["sound/eval/loss"]["tolerance"] = 0.005 * loss
    expected["sound/accuracy"] = {"value": 1, "tolerance": 0}
    (folder / "expected.json").write_text(json.dumps(expected))
    assert study.main(flags) == 1
    said = capsys.readouterr().err
    assert "sound/eval/loss is" in said and "sound/accuracy is not among the results" in said
    assert all(p.stat().st_mtime_ns == mtime for p, mtime in before.items())


def test_a_dry_run_prints_sizes_and_times(done, folders, capsys):
    folder, workdir = folders
    assert study.main([f"--study={folder}", f"--workdir={workdir}", "--dry_run"]) == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.splitlines()}
    record = json.loads((workdir / "runs" / "sound" / "run.json").read_text())
    assert f"{record['parameters']['total']:,}" in lines["sound"]
    assert f"{record['flops_per_step'] * STEPS:.3e}" in lines["sound"]
    assert lines["sound"].endswith("finished") and not lines["broken"].endswith("finished")
    assert f"{STEPS * 8 * 32:,}" in lines["sound"]  # tokens
    assert "estimated from 1 finished run(s) of the study" in out


def test_a_dry_run_prints_its_plan_before_it_times_anything(folders, tmp_path, capsys, monkeypatch):
    runs = read_study(folders[0], tmp_path, parse_run, make_task).runs
    state = State(runs[:1], runs[:1], {}, [[[runs[1]], []]])  # the other may follow
    monkeypatch.setattr(study, "state_of", lambda *_: state)
    printed = []

    def calibrated(*_):
        printed.append(capsys.readouterr().out)
        return Speed(10.0, 0.0, runs[0].flops / 50, "a test")

    monkeypatch.setattr(study.times, "calibrated", calibrated)
    study.main([f"--study={folders[0]}", f"--workdir={tmp_path}", "--dry_run"])
    total = f"in total at most {2 * runs[0].flops:.3e} FLOPs"
    assert "1 run(s) to train" in printed[0] and total in printed[0]
    expected = (
        "expected 1 min 0 s for 1 run(s), then at most 1 min 0 s for the 1 that their results "
        "choose: at most 2 min 0 s in total"
    )
    assert expected in capsys.readouterr().out
    study.main([f"--study={folders[0]}", f"--workdir={tmp_path}", "--dry_run", "--only=broken"])
    assert "1 other run(s) are not selected" in printed[1] and "in total" not in printed[1]


def test_the_total_of_a_dry_run_counts_the_runs_that_a_comparison_will_choose(tmp_path, capsys):
    """Two rates and three seeds each: the first seed of both, then two seeds of one of them."""
    runs = {
        f"{name}.lr{rate}.s{seed}": (f"--optimizer.learning_rate={rate}", f"--seed={seed}", *more)
        for name, more in (("a", ()), ("b", ("--transformer.qk_norm=true",)))
        for rate in ("1e-3", "2e-3")
        for seed in range(3)
    }
    settings = ("--study.analysis=comparison", "--study.baseline=a", "--study.seeds=2")
    folder = write_study(tmp_path / "study", BASE, runs, *settings)
    where = [f"--study={folder}", f"--workdir={tmp_path / 'work'}", "--dry_run"]
    study.main([*where, "--flops_per_second=1e6"])
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert sum(line.endswith("perhaps later") for line in lines) == 8
    assert "4 run(s) to train" in out and "then 4 run(s) that their results choose" in out
    assert "not selected" not in out and "at most" not in out
    now, later, total = re.findall(r"([\d.e+]+) FLOPs(?:$|;)", out, re.MULTILINE)
    assert float(total) == pytest.approx(float(now) + float(later), rel=1e-3)


def test_commands_for_other_machines(done, folders, capsys):
    folder, workdir = folders
    study.main([f"--study={folder}", f"--workdir={workdir}", "--launcher=print"])
    command = (
        f"python -m genai_jax.train --flagfile={folder}/broken.flags "
        f"--workdir={workdir}/runs/broken\n"
    )
    assert capsys.readouterr().out == command
    with pytest.raises(ConfigError, match="where jobs of --launcher=slurm read their flagf"):
        study.main([f"--study={folder}", f"--workdir={workdir}", "--launcher=slurm"])


def test_changed_flags_of_a_finished_run_are_refused(done, folders, tmp_path):
    folder, workdir = folders
    path = folder / "sound.flags"
    before = path.read_text()
    steps = rows(workdir / "runs" / "sound")[-1]["step"]
    try:
        for flag, says in (
            ("optimizer.learning_rate=5e-3", "learning_rate=0.001 -> 0.005"),
            (f"train.steps={steps + 1}", f"steps={steps} -> {steps + 1}"),  # another schedule
        ):
            path.write_text(f"{before}--{flag}\n")
            with pytest.raises(ConfigError, match=f"flags different from .*{says}"):
                study.main([f"--study={folder}", f"--workdir={workdir}", "--dry_run"])
    finally:
        path.write_text(before)


BASE = (*TINY, "--train.steps=4")


@pytest.mark.parametrize(
    ("runs", "settings", "flags", "words"),
    [
        ({}, (), (), "has no runs: it needs flagfiles besides base.flags and study.flags"),
        ({"a": ("--workdir=x",)}, (), (), "a.flags: sets --workdir=x"),
        ({"a": (), "A": ("--seed=2",)}, (), (), "write to the same workdir"),
        ({"a": (), "b": ()}, (), (), "a.flags and .*b.flags are the same run"),
        ({"a": ("--transformer.num_heads=3",)}, (), (), "a.flags: .*embed_dim=16 is not divisible"),
        ({"a": ("--gan.loss=x",)}, (), (), "a.flags: "),
        ({"a": ()}, (), ("--only=b*",), r"--only=b\* matches no run of the study; runs are a"),
        ({"a": ()}, ("--study.baseline=a",), (), "--study.baseline is not a flag of --study"),
        ({"a": ()}, ("--study.analysis=magic",), (), "magic is not one of scaling_law, compar"),
        ({"a": ()}, ("--study.analysis=scaling_law", "--study.held_out=z"), (), "held_out=z matc"),
        ({"a": ()}, (), ("--check",), "expected.json does not exist"),
        ({"a": ()}, (), ("--launcher_options=--nodes=2", "--launcher=print"), "only with --launch"),
        ({"a": ()}, (), ("--check", "--dry_run"), "--check has an effect only without --launcher"),
        ({"a": ()}, (), ("--jobs=2", "--launcher=print"), "--jobs has an effect only without"),
        ({"a": ()}, (), ("--flops_per_second=1e9",), "--flops_per_second has an effect only with"),
    ],
)  # fmt: skip
def test_bad_studies_are_one_line(runs, settings, flags, words, tmp_path):
    settings = ("--study.analysis=curves", *settings)
    folder = write_study(tmp_path / "study", BASE, runs, *settings)
    with pytest.raises(ConfigError, match=words) as caught:
        study.main([f"--study={folder}", f"--workdir={tmp_path / 'work'}", *flags])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "work" / "runs").exists()


def test_missing_and_incomplete_folders(tmp_path):
    with pytest.raises(ConfigError, match="--study is not set"):
        study.main([f"--workdir={tmp_path}"])
    with pytest.raises(ConfigError, match="no such folder"):
        study.main([f"--study={tmp_path / 'x'}", f"--workdir={tmp_path}"])
    with pytest.raises(ConfigError, match=r"is not a study yet: add README.md \(its heading and"):
        study.main([f"--study={tmp_path}", f"--workdir={tmp_path}"])
