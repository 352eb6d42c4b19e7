"""metrics.jsonl: resumed, damaged, replaced, of any length, on a disk that is full."""

import contextlib
import itertools
import json
import os
import random
import shutil
import socket
import struct
import subprocess
import time
import tracemalloc

import pytest

from genai_jax import train
from genai_jax.config import ConfigError
from genai_jax.training import metrics_log, plots
from genai_jax.training.metrics_log import MetricsLog, parse_rows, read_metrics, thinned
from tests.tasks.runs import steps_in
from tests.toy_tasks import Linear

FLAGS = (
    "--task=tests.toy_tasks:Linear", "--train.steps=12", "--train.log_every=1",
    "--train.progress=false", "--checkpoint.every=4", "--eval.every=6",
    "--optimizer.warmup_steps=0", "--optimizer.schedule=constant",
)  # fmt: skip


def row(step: int) -> dict:
    return {"step": step, "train/loss": 1 / step, "perf/step_time_s": 0.1}


def lines(*steps: int) -> str:
    return "".join(json.dumps(row(step)) + "\n" for step in steps)


def steps_of(path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def go_on(folder, step: int):
    """Opens the log of a run that goes on after a step, and writes two more rows."""
    log = MetricsLog(folder, step)
    assert log.write(row(step + 1), row(step + 2))
    log.close()


@pytest.mark.parametrize("block", [1 << 16, 100, 7])
def test_rows_after_the_checkpoint_are_dropped(tmp_path, monkeypatch, capsys, block):
    monkeypatch.setattr(metrics_log, "BLOCK", block)
    path, rng = tmp_path / "metrics.jsonl", random.Random(block)
    for _ in range(20):
        count, start = rng.randrange(1, 60), rng.randrange(0, 70)
        text = lines(*range(2, 2 * count, 2))
        path.write_text(text[: len(text) - rng.choice([0, 0, 1, 10])])  # cut by a crash
        before = [r["step"] for r in read_metrics(path)]
        go_on(tmp_path, start)
        kept = [step for step in before if step <= start]
        assert steps_of(path) == [*kept, start + 1, start + 2]
    assert capsys.readouterr().err == ""


FOREIGN = {
    "list": b"[1, 2]",
    "number": b"3",
    "no step": b'{"train/loss": 1}',
    "step of another type": b'{"step": "9"}',
    "text as a value": b'{"step": 9, "train/loss": "x"}',
    "not UTF-8": b'{"step": 9, "\xff": 1}',
    "deep": b"[" * 100_000,
    "digits": b'{"step": ' + b"9" * 100_000 + b"}",
    "a large number": b'{"step": 9, "x": ' + b"9" * 400 + b"}",
    "cut": b'{"step": 9, "train/lo',
    "zeros": b"\0" * 5000,
    "empty": b"",
}


@pytest.mark.parametrize("foreign", FOREIGN.values(), ids=FOREIGN)
def test_lines_that_are_no_rows(tmp_path, capsys, foreign):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines(1, 2).encode() + foreign + b"\n" + lines(3, 4).encode())
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4]
    assert capsys.readouterr().err == f"warning: skipped 1 line(s) of {path} that are not metrics\n"
    go_on(tmp_path, 2)
    assert steps_of(path) == [1, 2, 3, 4]
    err = capsys.readouterr().err
    assert err == f"warning: dropped 1 line(s) that are not metrics from {path}\n"
    path.write_bytes(lines(1, 2).encode() + foreign)  # as a crash may leave the last line
    go_on(tmp_path, 2)
    assert steps_of(path) == [1, 2, 3, 4] and capsys.readouterr().err == ""


def test_what_is_not_a_file_of_rows_is_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"x" * (3 << 20) + b"\n")
    with pytest.raises(ConfigError, match=r"metrics.jsonl has a line of more than 1048576 b"):
        MetricsLog(tmp_path, 3)
    path.unlink()
    os.mkfifo(path)
    for use in (lambda: MetricsLog(tmp_path, 3), lambda: read_metrics(path)):
        with pytest.raises(ConfigError, match=r"metrics.jsonl is not a regular file"):
            use()


@pytest.mark.parametrize("how", ["deleted", "replaced", "cut"])
def test_a_file_that_goes_away_during_the_run(tmp_path, capsys, how):
    path, log = tmp_path / "metrics.jsonl", MetricsLog(tmp_path, 0)
    log.write(row(1), row(2))
    if how == "cut":
        os.truncate(path, 3)
    else:
        path.unlink()
    if how == "replaced":
        path.write_text(lines(1, 3))
    log.write(row(3), row(4))
    log.close()
    assert steps_of(path) == [*([1] if how == "replaced" else []), 3, 4]
    err = capsys.readouterr().err
    assert "was deleted or replaced" in err and "before step 3" in err and err.count("\n") == 1


def test_a_file_cut_to_nothing_while_read_is_no_error(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    (tmp_path / "metrics.jsonl").touch()
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def events(folder) -> list:
    """The events of all files of TensorBoard."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    found = []
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            content = data[12 : 12 + size]
            sums = data[8:12] + data[12 + size : 16 + size]
            expected = masked_crc32c(data[:8]), masked_crc32c(content)
            assert struct.unpack("<II", sums) == expected
            found.append(Event.FromString(content))
            data = data[16 + size :]
    return found


def test_tensorboard_gets_every_value_at_once(tmp_path):
    log = MetricsLog(tmp_path, 4)
    log.write(row(5))
    version, begin, event = events(tmp_path / "tensorboard")  # though the log is still open
    assert version.file_version == "brain.Event:2" and begin.step == 5 and begin.session_log.status
    values = {value.tag: value.simple_value for value in event.summary.value}
    assert event.step == 5 and values == pytest.approx({"train/loss": 0.2, "perf/step_time_s": 0.1})
    log.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an undisturbed run logs."""
    folder = tmp_path_factory.mktemp("whole")
    assert train.main([*FLAGS, f"--workdir={folder}"]) == 0
    return values(folder)


def values(folder) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith("perf/")} for r in rows]


@pytest.mark.parametrize("step", [1, 3, 6, 12])
def test_a_row_that_cannot_be_written_ends_the_run_saved(whole, tmp_path, monkeypatch, step):
    write = metrics_log._write_all

    def full(file, data):
        if f'"step": {step},' in data.decode():
            raise OSError(28, "No space left on device")
        write(file, data)

    command = [*FLAGS, f"--workdir={tmp_path}"]
    with monkeypatch.context() as patch:
        patch.setattr(metrics_log, "_write_all", full)
        said = r"cannot write to .*metrics.jsonl: No space left on device; step \d+ is the last one"
        for _ in range(2):  # the disk is still full when the run goes on
            with pytest.raises(ConfigError, match=said):
                train.main(command)
            assert steps_of(tmp_path / "metrics.jsonl") == list(range(1, step))
    assert train.main(command) == 0
    assert values(tmp_path) == whole


def test_numbers_that_are_not_finite_are_left_out_with_one_warning(tmp_path, capsys):
    log = MetricsLog(tmp_path, 0)
    nan, inf = float("nan"), float("inf")
    assert log.write(row(1) | {"eval/kl": nan}, row(2) | {"eval/kl": inf}, row(3) | {"eval/kl": 1})
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [row(1), row(2), row(3) | {"eval/kl": 1}]
    assert capsys.readouterr().err.count("warning: eval/kl is nan at step 1; rows leave it") == 1


def test_a_held_out_loss_that_is_not_finite_ends_the_run(tmp_path, monkeypatch):
    metrics = Linear.example_metrics
    command = [*FLAGS, f"--workdir={tmp_path}"]

    def wild(*arguments):
        (loss,) = metrics(*arguments).values()
        return {"loss": loss._replace(total=loss.total / 0)}

    with monkeypatch.context() as patch:
        patch.setattr(Linear, "example_metrics", wild)
        said = "the held-out loss is inf at step 6; the last good checkpoint is step 4"
        with pytest.raises(ConfigError, match=said):
            train.main(command)
    assert steps_in(tmp_path) == [4] and steps_of(tmp_path / "metrics.jsonl") == [1, 2, 3, 4, 5]


def test_averages_that_cannot_be_written_end_the_run_saved(whole, tmp_path):
    (tmp_path / "ema").touch()
    command = [*FLAGS, f"--workdir={tmp_path}", "--ema.relative_width=0.1"]
    said = r"cannot write to .*/ema: .* exists; step 3 is the last one saved"
    with pytest.raises(ConfigError, match=said):
        train.main([*command, "--ema.snapshot_every=3"])
    assert steps_of(tmp_path / "metrics.jsonl") == [1, 2, 3]
    (tmp_path / "ema").unlink()
    assert train.main([*command, "--ema.snapshot_every=3"]) == 0
    averaged = [{n: v for n, v in r.items() if "eval/ema/" not in n} for r in values(tmp_path)]
    assert averaged == whole


def test_a_log_that_went_away_between_two_processes_is_missed(tmp_path, capsys):
    go_on(tmp_path, 0)
    assert "missing" not in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").unlink()
    go_on(tmp_path, 2)
    assert "is missing, and with it the rows up to step 2" in capsys.readouterr().err


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.parametrize("free", [0, 8192, 200_000])
def test_a_disk_that_fills_up_never_holds_a_run(small_disk, free):
    workdir, ballast = small_disk / "run", small_disk / "ballast"
    command = [*FLAGS, f"--workdir={workdir}"]
    assert train.main([*command, "--train.steps=4"]) == 0
    with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    os.truncate(ballast, max(ballast.stat().st_size - free, 0))
    longer = ["--train.steps=20000", "--eval.every=0", "--checkpoint.every=0"]
    with pytest.raises((ConfigError, OSError), match="No space left on device") as error:
        train.main([*command, *longer])
    assert "\n" not in str(error.value)
    ballast.unlink()
    last = max(*steps_in(workdir), 10)
    assert train.main([*command, f"--train.steps={last + 2}"]) == 0
    assert steps_of(workdir / "metrics.jsonl") == list(range(1, last + 3))  # none is missing


@pytest.mark.parametrize("how", ["a file is in the way", "full"])
def test_a_run_does_not_need_tensorboard(whole, tmp_path, capsys, how):
    (tmp_path / "tensorboard").mkdir()
    if how == "full":
        for second in range(-2, 30):
            name = f"events.out.tfevents.{time.time() + second:.0f}.{socket.gethostname()}"
            (tmp_path / "tensorboard" / f"{name}.{os.getpid()}").symlink_to("/dev/full")
    else:
        (tmp_path / "tensorboard").rmdir()
        (tmp_path / "tensorboard").touch()
    assert train.main([*FLAGS, f"--workdir={tmp_path}"]) == 0
    assert values(tmp_path) == whole
    err = capsys.readouterr().err
    assert err.count("no more events for TensorBoard") == 1 and err.count("\n") == 1
    assert ("No space left" if how == "full" else "File exists") in err


@pytest.mark.parametrize("evaluated", [1000, 1])
def test_a_long_file_is_thinned_for_the_plot(tmp_path, evaluated):
    every = [
        json.dumps(row(step) | ({"eval/loss": 0.5} if step % evaluated == 0 else {})).encode()
        for step in range(1, 100_001)
    ]
    rows = list(parse_rows(thinned(every, 500), tmp_path))
    steps = [r["step"] for r in rows]
    assert steps[0] == 1 and steps[-1] == 100_000 and steps == sorted(set(steps))
    assert 500 <= len(steps) <= 1101
    assert max(later - step for step, later in itertools.pairwise(steps)) <= 200
    assert sum("eval/loss" in r for r in rows) >= 100
    short = every[:700]
    assert thinned(short, 500) == short


def test_a_resume_and_a_plot_need_little_memory(tmp_path, monkeypatch):
    text = "".join(json.dumps(row(step) | {"train/other": 0.1}) + "\n" for step in range(1, 50_001))
    (tmp_path / "metrics.jsonl").write_text(text)
    monkeypatch.setattr(plots, "_plot", lambda *_: None)
    tracemalloc.start()
    try:
        go_on(tmp_path, 49_000)
        resumed = tracemalloc.get_traced_memory()[1]
        plots.plot_metrics(tmp_path, type("Task", (), {"loss_unit": "", "curves": {}}))
        plotted = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert resumed < 1 << 20 and plotted < 8 << 20


def test_any_name_of_a_workdir_is_a_title(tmp_path, capsys):
    workdir = tmp_path / "a $b_$ \\frac{ \udcff"
    workdir.mkdir()
    (workdir / "metrics.jsonl").write_text('{"step": 1, "train/$x_loss": 1.0}\n' + lines(2))
    task = type("Task", (), {"loss_unit": "", "curves": {}})
    plots.plot_metrics(workdir, task)
    assert (workdir / "plots" / "loss.png").exists() and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("metric", "suffixes", "name"),
    [
        ("train/loss", ("loss",), "training"),
        ("eval/loss", ("loss",), "held out"),
        ("eval/ema/loss", ("loss",), "held out, average"),
        ("train/generator/loss", ("loss",), "training, generator"),
        ("train/moe/router_z_loss", ("loss",), "training, moe router z loss"),
        ("train/critic/real", ("/real", "/fake"), "training, critic real"),
        ("eval/real", ("/real", "/fake"), "held out, real"),
        ("eval/ema/fake", ("/real", "/fake"), "held out, average, fake"),
    ],
)
def test_curves_are_named_in_words(metric, suffixes, name):
    assert plots.curve_name(metric, suffixes) == name


@pytest.mark.parametrize(("unit", "label"), [("nats", "loss (nats)"), ("loss", "loss")])
def test_the_axis_of_a_plot_has_its_unit(tmp_path, monkeypatch, unit, label):
    (tmp_path / "metrics.jsonl").write_text(lines(1, 2))
    labels = []
    monkeypatch.setattr(plots, "_plot", lambda *arguments: labels.append(arguments[-1]))
    plots.plot_metrics(tmp_path, type("Task", (), {"loss_unit": unit, "curves": {}}))
    assert labels == [label]
