"""The commands on a tiny run: files, resuming exactly, faults.

The flags below give one compiled step to all tests: each other step costs a compilation.
"""

import json
import os
import pathlib
import shutil
import signal
import time

import pytest

from genai_jax import evaluate, sample, train
from genai_jax.config import ConfigError
from genai_jax.tasks.language.data import TextData
from tests.commands import TINY, run, start
from tests.tasks.runs import copy_until, steps_in

SPEED = ("perf/",)


def rows(workdir) -> list[dict]:
    """The rows of metrics.jsonl without those that measure time."""
    lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if not k.startswith(SPEED)} for row in parsed]


def flags(text_folder, **changes) -> tuple[str, ...]:
    every = {"train.steps": 12, "train.log_every": 2, "eval.every": 6, "checkpoint.every": 4}
    every |= {"ema.decay": 0.9, "transformer.dropout": 0.1, "checkpoint.keep": 3}
    every |= {"optimizer.schedule": "rsqrt"} | changes  # the one that does not depend on steps
    settings = [f"--{name}={value}" for name, value in every.items()]
    return (*TINY, f"--data.dataset=text:{text_folder}", *settings)


@pytest.fixture(scope="module")
def whole(text_folder, tmp_path_factory):
    """An uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole")
    _, said = run("train", *flags(text_folder), f"--workdir={workdir}", "--train.progress")
    (workdir / "said").write_text(said)
    return workdir


@pytest.mark.smoke
def test_a_run_leaves_the_files_of_the_contract(whole):
    written = rows(whole)
    assert [row["step"] for row in written] == [2, 4, 6, 8, 10, 12]
    for row in written:
        assert {"train/loss", "train/learning_rate", "train/grad_norm"} <= set(row)
    assert {"eval/loss", "eval/bits_per_byte"} <= set(written[-1])
    last = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    for name in ("step_time_s", "tokens_per_second", "examples_per_second", "mfu"):
        assert last[f"perf/{name}"] > 0
    assert written[-1]["train/loss"] < written[0]["train/loss"]
    record = json.loads((whole / "run.json").read_text())
    assert record["parameters"]["total"] == record["parameters"]["model"] > 256 * 16
    documents = [record["data"][f"{split}_documents"] for split in ("train", "validation")]
    assert sum(documents) == 40 and min(documents) > 0 and record["flops_per_step"] > 0
    assert "measured on this machine" in record["peak"]["source"]
    assert (whole / "plots" / "loss.png").stat().st_size > 10_000
    assert list((whole / "tensorboard").glob("events.*"))
    rates = [row["train/learning_rate"] for row in written]  # warmup of one step, then rsqrt
    assert rates == pytest.approx([1e-3 * (1 / (row["step"] - 1)) ** 0.5 for row in written])
    assert steps_in(whole) == [4, 8, 12]


def test_a_run_says_what_it_trains_and_what_came_out(whole):
    said = (whole / "said").read_text()
    parameters = json.loads((whole / "run.json").read_text())["parameters"]["total"]
    assert f"\nlanguage_model: {parameters:,} parameters; text:" in said
    assert "; 12 steps of 256 tokens\n1 cpu device(s); " in said and " FLOPs per step: at " in said
    first, second = said.splitlines()[-2:]
    loss = rows(whole)[-1]["eval/loss"]
    assert first.startswith(f"{whole}: step 12; held-out loss {loss:.4g}, ")
    assert first.endswith(f"; curves in {whole}/plots")
    assert second == f"python -m genai_jax.sample --workdir={whole}"


@pytest.mark.smoke
def test_sample_and_evaluate_work_on_it(whole, tmp_path, capsys):
    def output(command, *flags):
        assert command.main([f"--workdir={whole}", *flags]) == 0
        return capsys.readouterr().out

    text, _ = run("sample", f"--workdir={whole}", "--prompt=the cat", "--max_tokens=20")
    assert text.startswith("the cat") and len(text) > 10
    assert output(sample, "--prompt=the cat", "--max_tokens=20") == text
    (tmp_path / "prompts").write_text("a\nlonger prompt\n")
    file = tmp_path / "new" / "out.txt"
    output(
        sample, f"--prompt_file={tmp_path / 'prompts'}", "--num_samples=2", f"--output={file}",
        "--ema=0.9", "--temperature=0", "--max_tokens=5",
    )  # fmt: skip
    parts = file.read_text().split("--- sample ")[1:]
    assert len(parts) == 4 and parts[0][7:] == parts[1][7:] and "longer prompt" in parts[2]
    scores = json.loads(output(evaluate))
    assert scores["step"] == 12 and scores["tokens_per_second"] > 0
    assert scores["bits_per_byte"] == pytest.approx(rows(whole)[-1]["eval/bits_per_byte"])
    average = json.loads(output(evaluate, "--ema=0.9"))
    assert average["loss"] != scores["loss"] and average["ema"] == "0.9"


def test_flags_txt_reproduces_the_run_with_a_profile_window_too(whole, tmp_path):
    window = ("--profile.start=1", "--profile.steps=2")
    run("train", f"--flagfile={whole / 'flags.txt'}", f"--workdir={tmp_path}", *window)
    assert rows(tmp_path) == rows(whole)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_finished_run_is_left_alone(whole, text_folder, capsys):
    before = rows(whole)
    assert train.main([*flags(text_folder), f"--workdir={whole}", "--data.prefetch=0"]) == 0
    err = capsys.readouterr().err
    assert "trained to step 12 already" in err and "--data.prefetch=4 -> 0" in err
    flagfile = (whole / "flags.txt").read_text()
    with pytest.raises(ConfigError, match=r"to step 12 already, more than --train\.steps=6"):
        train.main([*flags(text_folder), f"--workdir={whole}", "--train.steps=6"])
    assert rows(whole) == before and (whole / "flags.txt").read_text() == flagfile


def test_other_flags_in_the_same_workdir_are_named(whole, text_folder):
    changed = flags(text_folder, **{"optimizer.learning_rate": 0.5})
    with pytest.raises(ConfigError, match=r"--optimizer.learning_rate=0.001 -> 0.5"):
        train.main([*changed, f"--workdir={whole}"])


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.005)


def reached(workdir, step):
    path = pathlib.Path(workdir) / "metrics.jsonl"
    return lambda: path.exists() and f'"step": {step},' in path.read_text()


@pytest.mark.parametrize(
    ("number", "moment"), [(signal.SIGTERM, "training"), (signal.SIGINT, "first compilation")]
)
def test_a_signal_saves_and_the_same_command_goes_on_bit_for_bit(
    whole, text_folder, tmp_path, number, moment
):
    command = (*flags(text_folder), f"--workdir={tmp_path}")
    process = start("train", *command)
    compiling = lambda: (tmp_path / "run.json").exists()
    wait_for(reached(tmp_path, 2) if moment == "training" else compiling, process)
    process.send_signal(number)
    if moment == "first compilation":  # what a closing terminal and its shell may send
        for other in (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP, number):
            process.send_signal(other)
    _, err = process.communicate(timeout=120)
    if moment == "first compilation" and process.returncode == 128 + signal.SIGHUP:
        number = signal.SIGHUP  # of what is pending together, python handles the lowest first
    assert process.returncode == 128 + number, err
    assert f"stopped by signal {int(number)} at step" in err
    assert err.count("\n") == 2 and err.startswith("note: text:")  # what was read
    stopped_at = max(steps_in(tmp_path))
    assert 1 <= stopped_at < 12 and f"at step {stopped_at}\n" in err
    run("train", *command)
    assert rows(tmp_path) == rows(whole)


def test_a_signal_during_an_evaluation_ends_it_and_saves(whole, text_folder, tmp_path, monkeypatch):
    held_out = TextData.held_out

    def interrupted(data, max_batches, rows):
        for i, batch in enumerate(held_out(data, max_batches, rows)):
            assert i < 2, "the evaluation went on"
            if i == 1:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)  # together they count as one
            yield batch

    command = [*flags(text_folder), f"--workdir={tmp_path}"]
    with monkeypatch.context() as patch:
        patch.setattr(TextData, "held_out", interrupted)
        assert train.main(command) == 143
    assert steps_in(tmp_path) == [4, 6] and [row["step"] for row in rows(tmp_path)] == [2, 4]
    assert train.main([*command, "--data.prefetch=0"]) == 0
    assert rows(tmp_path) == rows(whole)


def test_kill_9_while_saving_and_the_same_command_give_the_same_values(
    whole, text_folder, tmp_path
):
    """At other moments: tests/test_kill.py."""
    command = (*flags(text_folder), f"--workdir={tmp_path}")
    process = start("train", *command)
    folder = tmp_path / "checkpoints"
    saving = lambda: folder.exists() and any(p.name.startswith("8") for p in folder.iterdir())
    wait_for(saving, process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL  # it had not come to its end by itself
    run("train", *command)
    assert rows(tmp_path) == rows(whole)


def damage(checkpoint: pathlib.Path, how: str):
    files = [p for p in checkpoint.rglob("*") if p.is_file() and p.stat().st_size > 0]
    largest = max(files, key=lambda p: p.stat().st_size)
    if how == "truncated":
        os.truncate(largest, largest.stat().st_size // 2)
    elif how == "flipped":
        data = bytearray(largest.read_bytes())
        data[len(data) // 2] ^= 0xFF
        largest.write_bytes(data)
    else:
        shutil.rmtree(checkpoint / "state")


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(whole, text_folder, tmp_path, how, capsys):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "checkpoints" / "12", how)
    assert train.main([*flags(text_folder), f"--workdir={tmp_path}"]) == 0
    err = capsys.readouterr().err
    assert "/checkpoints/12 is damaged: " in err
    assert "at step 8" in err
    assert rows(tmp_path) == rows(whole) and steps_in(tmp_path) == [4, 8, 12]


def test_when_every_checkpoint_is_damaged_nothing_is_overwritten(whole, text_folder, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    for step in steps_in(tmp_path):
        damage(tmp_path / "checkpoints" / str(step), "missing")
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match="no other checkpoint is left"):
        train.main([*flags(text_folder), f"--workdir={tmp_path}"])
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert steps_in(tmp_path) == [4, 8, 12]


def test_a_run_goes_on_for_longer(whole, text_folder, tmp_path, capsys):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    longer = flags(text_folder, **{"train.steps": 18})
    assert train.main([*longer, f"--workdir={tmp_path}"]) == 0
    err = capsys.readouterr().err
    assert "at step 12" in err and "--train.steps=12 -> 18" in err
    assert rows(tmp_path)[:6] == rows(whole) and rows(tmp_path)[-1]["step"] == 18


def test_a_run_goes_on_and_is_scored_on_another_mesh(whole, text_folder, tmp_path):
    copy_until(whole, 4, tmp_path)
    mesh = ("--mesh.data=2", "--mesh.fsdp=2", "--mesh.tensor=2")
    _, err = run("train", *flags(text_folder), *mesh, f"--workdir={tmp_path}", devices=8)
    assert "at step 4" in err and "--mesh.tensor=1 -> 2" in err
    for one, eight in zip(rows(whole), rows(tmp_path), strict=True):
        assert eight["train/loss"] == pytest.approx(one["train/loss"], rel=1e-4)
    out, _ = run("evaluate", f"--workdir={tmp_path}")
    assert json.loads(out)["loss"] == pytest.approx(rows(tmp_path)[-1]["eval/loss"], rel=1e-5)


def test_a_full_disk_stops_the_run_and_keeps_what_was_saved(whole, text_folder, tmp_path):
    import resource

    copy_until(whole, 4, tmp_path)
    command = (*flags(text_folder), f"--workdir={tmp_path}")
    process = start("train", *command)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (40_000, 40_000))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    line = err.strip().splitlines()[-1]
    assert line.startswith("error: cannot save a checkpoint") and "step 4 is the last one" in line
    assert "File too large" in line and "Traceback" not in err
    assert [row["step"] for row in rows(tmp_path)][:2] == [2, 4]
    assert train.main(command) == 0
    assert rows(tmp_path) == rows(whole)


def test_a_loss_that_is_not_finite_stops_the_run(text_folder, tmp_path):
    wild = {"optimizer.learning_rate": 1e18, "optimizer.clip_norm": 0, "checkpoint.every": 1}
    command = (*flags(text_folder, **wild), f"--workdir={tmp_path}", "--optimizer.name=sgd")
    small = ("--ema.decay=", "--transformer.dropout=0", "--transformer.num_layers=1")
    said = (
        r"loss is (nan|-?inf) at step 2; no checkpoint is before it"  # what step 1 saved caused it
    )
    with pytest.raises(ConfigError, match=said):
        train.main([*command, *small])
