"""The commands on a tiny run: files, resuming exactly, faults."""

import json
import os
import pathlib
import shutil
import signal
import time

import pytest

from tests.commands import TINY, run, start

SPEED = ("perf/",)


def rows(workdir) -> list[dict]:
    """The rows of metrics.jsonl without those that measure time."""
    lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if not k.startswith(SPEED)} for row in parsed]


def flags(text_folder, **changes) -> tuple[str, ...]:
    every = {"train.steps": 12, "train.log_every": 2, "eval.every": 6, "checkpoint.every": 4}
    every |= {"ema.decay": 0.9, "transformer.dropout": 0.1, "checkpoint.keep": 3} | changes
    settings = [f"--{name}={value}" for name, value in every.items()]
    return (*TINY, f"--data.dataset=text:{text_folder}", *settings)


@pytest.fixture(scope="module")
def whole(text_folder, tmp_path_factory):
    """An uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole")
    run("train", *flags(text_folder), f"--workdir={workdir}")
    return workdir


@pytest.mark.smoke
def test_a_run_leaves_the_files_of_the_contract(whole):
    written = rows(whole)
    assert [row["step"] for row in written] == [2, 4, 6, 8, 10, 12]
    assert {"train/loss", "train/grad_norm", "eval/loss", "eval/bits_per_byte"} <= set(written[-1])
    last = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    for name in ("step_time_s", "tokens_per_second", "examples_per_second", "mfu"):
        assert last[f"perf/{name}"] > 0
    assert written[-1]["train/loss"] < written[0]["train/loss"]
    record = json.loads((whole / "run.json").read_text())
    assert record["parameters"]["total"] == record["parameters"]["model"] > 256 * 16
    assert record["data"]["train_documents"] == 38 and record["flops_per_step"] > 0
    assert "measured on this machine" in record["peak"]["source"]
    assert (whole / "plots" / "loss.png").stat().st_size > 10_000
    assert list((whole / "tensorboard").glob("events.*"))
    kept = sorted(int(p.name) for p in (whole / "checkpoints").iterdir() if p.name.isdigit())
    assert kept == [4, 8, 12]


@pytest.mark.smoke
def test_sample_and_evaluate_work_on_it(whole, tmp_path):
    text, _ = run("sample", f"--workdir={whole}", "--prompt=the cat", "--max_tokens=20")
    assert text.startswith("the cat") and len(text) > 10
    again, _ = run("sample", f"--workdir={whole}", "--prompt=the cat", "--max_tokens=20")
    assert again == text
    (tmp_path / "prompts").write_text("a\nlonger prompt\n")
    output = tmp_path / "out.txt"
    run(
        "sample", f"--workdir={whole}", f"--prompt_file={tmp_path / 'prompts'}", "--num_samples=2",
        f"--output={output}", "--ema=0.9", "--temperature=0", "--max_tokens=5",
    )  # fmt: skip
    parts = output.read_text().split("--- sample ")[1:]
    assert len(parts) == 4 and parts[0][7:] == parts[1][7:] and "longer prompt" in parts[2]
    out, _ = run("evaluate", f"--workdir={whole}")
    scores = json.loads(out)
    assert scores["step"] == 12 and scores["tokens_per_second"] > 0
    assert scores["bits_per_byte"] == pytest.approx(rows(whole)[-1]["eval/bits_per_byte"])
    average = json.loads(run("evaluate", f"--workdir={whole}", "--ema=0.9")[0])
    assert average["loss"] != scores["loss"] and average["ema"] == "0.9"


def test_flags_txt_reproduces_the_run_by_itself(whole, tmp_path):
    run("train", f"--flagfile={whole / 'flags.txt'}", f"--workdir={tmp_path}")
    assert rows(tmp_path) == rows(whole)


def test_a_finished_run_is_left_alone(whole, text_folder):
    before = rows(whole)
    _, err = run("train", *flags(text_folder), f"--workdir={whole}")
    assert "trained to step 12 already" in err and rows(whole) == before


def test_other_flags_in_the_same_workdir_are_named(whole, text_folder):
    changed = flags(text_folder, **{"optimizer.learning_rate": 0.5})
    _, err = run("train", *changed, f"--workdir={whole}", code=2)
    assert err.count("\n") == 1 and "--optimizer.learning_rate=0.001 -> 0.5" in err


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.005)


def reached(workdir, step):
    path = pathlib.Path(workdir) / "metrics.jsonl"
    return lambda: path.exists() and f'"step": {step},' in path.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on_bit_for_bit(
    whole, text_folder, tmp_path, number
):
    command = (*flags(text_folder), f"--workdir={tmp_path}")
    process = start("train", *command)
    wait_for(reached(tmp_path, 2), process)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number, err
    assert f"stopped by signal {int(number)} at step" in err
    stopped_at = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert 2 <= stopped_at <= 12
    run("train", *command)
    assert rows(tmp_path) == rows(whole)


def test_a_signal_during_the_first_compilation_saves_too(whole, text_folder, tmp_path):
    command = (*flags(text_folder), f"--workdir={tmp_path}")
    process = start("train", *command)
    wait_for(lambda: (tmp_path / "run.json").exists(), process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 143
    run("train", *command)
    assert rows(tmp_path) == rows(whole)


@pytest.mark.parametrize("moment", ["training", "saving"])
def test_kill_9_and_the_same_command_give_the_same_values(whole, text_folder, tmp_path, moment):
    command = (*flags(text_folder), f"--workdir={tmp_path}")
    process = start("train", *command)
    if moment == "training":
        wait_for(reached(tmp_path, 6), process)
    else:  # while orbax is writing the second checkpoint
        folder = tmp_path / "checkpoints"
        wait_for(
            lambda: folder.exists() and any(p.name.startswith("8") for p in folder.iterdir()),
            process,
        )
    process.kill()
    process.communicate()
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
def test_a_damaged_checkpoint_is_skipped_with_a_warning(whole, text_folder, tmp_path, how):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "checkpoints" / "12", how)
    _, err = run("train", *flags(text_folder), f"--workdir={tmp_path}")
    assert "warning: checkpoint 12 cannot be restored" in err
    assert "at step 8" in err
    assert rows(tmp_path) == rows(whole)


def test_when_every_checkpoint_is_damaged_nothing_is_overwritten(whole, text_folder, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    for checkpoint in (tmp_path / "checkpoints").iterdir():
        if checkpoint.name.isdigit():
            damage(checkpoint, "missing")
    before = (tmp_path / "metrics.jsonl").read_text()
    _, err = run("train", *flags(text_folder), f"--workdir={tmp_path}", code=2)
    assert "no other checkpoint is left" in err
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_run_goes_on_and_is_sampled_on_another_mesh(whole, text_folder, tmp_path):
    longer = flags(text_folder, **{"train.steps": 18})
    one, eight = tmp_path / "one", tmp_path / "eight"
    for workdir, extra, devices in [
        (one, (), 1),
        (eight, ("--mesh.data=2", "--mesh.fsdp=2", "--mesh.tensor=2"), 8),
    ]:
        shutil.copytree(whole, workdir)
        _, err = run("train", *longer, *extra, f"--workdir={workdir}", devices=devices)
        assert "at step 12" in err and "--train.steps=12 -> 18" in err
    for a, b in zip(rows(one), rows(eight), strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-4)
    out, _ = run("evaluate", f"--workdir={eight}")
    assert json.loads(out)["loss"] == pytest.approx(rows(eight)[-1]["eval/loss"], rel=1e-5)


def test_a_full_disk_stops_the_run_and_keeps_what_was_saved(text_folder, tmp_path):
    import resource

    whole = (*flags(text_folder), f"--workdir={tmp_path}")
    run("train", *whole, "--train.steps=4")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
    _, err = run("train", *whole, code=2, preexec_fn=limit)
    line = err.strip().splitlines()[-1]
    assert line.startswith("error: cannot save a checkpoint") and "step 4 is the last one" in line
    assert len(rows(tmp_path)) >= 2
    run("train", *whole)
    assert rows(tmp_path)[-1]["step"] == 12


def test_a_loss_that_is_not_finite_stops_the_run(text_folder, tmp_path):
    wild = {"optimizer.learning_rate": 1e18, "optimizer.clip_norm": 0, "checkpoint.every": 1}
    command = (*flags(text_folder, **wild), f"--workdir={tmp_path}", "--optimizer.name=sgd")
    _, err = run("train", *command, code=2)
    line = err.strip().splitlines()[-1]
    assert "at step" in line and "the last good checkpoint is step" in line, err
    assert any(name in line for name in ("nan", "inf"))


def test_a_profile_window_is_written(text_folder, tmp_path):
    settings = {"train.steps": 4, "profile.start": 1, "profile.steps": 2, "eval.batches": 1}
    run("train", *flags(text_folder, **settings), f"--workdir={tmp_path}")
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
