"""Several processes on loopback are one program: same data, same numbers, one end for all.

A process costs seconds to start and to compile, so one story serves most assertions: a run of one
process of eight devices; the same run continued from its second step by two processes of four,
until one of them gets a signal; by four of two, until one is killed; and by two again to its end,
while strangers connect.
"""

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from benchmarks.roll_call import Strangers
from tests.commands import TINY, environment, run
from tests.conftest import ROOT
from tests.tasks.runs import copy_until, steps_in
from tests.test_train import reached, rows

pytestmark = pytest.mark.depends_on("whole runs")

STEPS = 8
FLAGS = (
    *TINY,
    "--transformer.num_layers=1",
    "--transformer.num_heads=4",
    "--mesh.data=1",
    "--mesh.fsdp=2",
    "--mesh.tensor=4",
    "--optimizer.schedule=rsqrt",
    "--train.log_every=1",
    "--eval.batches=2",
    "--checkpoint.keep=100",
    "--sample.every=3",
)


def free_port() -> int:
    """A port that nobody listens on, nor on the one above."""
    while True:
        with socket.socket() as a, socket.socket() as b, contextlib.suppress(OSError):
            a.bind(("", 0))
            port = a.getsockname()[1]
            b.bind(("", port + 1))
            return port


class Processes:
    """One command by several processes of 8 / count devices."""

    def __init__(self, count: int, *flags: str, command: str = "train"):
        self.port = free_port()
        address = f"--distributed.coordinator=127.0.0.1:{self.port}"
        command = [sys.executable, "-m", f"genai_jax.{command}", *flags, address]
        self.said = [""] * count  # stderr of each, so far
        self.printed = [""] * count  # stdout of each
        self.processes = [
            subprocess.Popen(
                [*command, f"--distributed.num_processes={count}", f"--distributed.process_id={i}"],
                env=environment(devices=8 // count), cwd=ROOT, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
            for i in range(count)
        ]  # fmt: skip
        self.threads = [
            threading.Thread(target=listen, args=(i,), daemon=True)
            for i in range(count)
            for listen in (self._listen, self._read)
        ]
        for thread in self.threads:
            thread.start()

    def _listen(self, index: int):
        for line in self.processes[index].stderr:
            self.said[index] += line

    def _read(self, index: int):
        self.printed[index] = self.processes[index].stdout.read()

    def wait_until(self, condition, seconds: float = 400):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.said
            assert all(p.poll() is None for p in self.processes), self.said
            time.sleep(0.02)

    def wait(self, seconds: float = 400) -> list[int]:
        """The exit codes of all."""
        try:
            codes = [process.wait(seconds) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        for thread in self.threads:
            thread.join()
        return codes


@pytest.fixture(scope="module")
def flags(text_folder):
    return (*FLAGS, f"--data.dataset=text:{text_folder}")


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """An uninterrupted run of one process of eight devices, and what it reported of meshes."""
    workdir = tmp_path_factory.mktemp("whole")
    command = [sys.executable, "-m", "tests.training.one_process_of_eight", str(free_port())]
    ours = (f"--train.steps={STEPS}", "--checkpoint.every=2", f"--workdir={workdir}")
    result = subprocess.run(
        [*command, *flags, *ours],
        env=environment(devices=8), cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return workdir, json.loads(result.stdout.splitlines()[-1])


def test_a_checkpoint_of_one_mesh_is_restored_on_any_other(whole):
    assert whole[1] == {"same": [True, True, True], "placed": True}


@pytest.fixture(scope="module")
def story(whole, flags, tmp_path_factory):
    """The run's second life: by two, four and two processes. See the top of this file."""
    workdir = tmp_path_factory.mktemp("story")
    copy_until(whole[0], 2, workdir)
    shutil.rmtree(workdir / "carried")
    ours = (*flags, f"--workdir={workdir}")
    told = {}

    two = Processes(2, *ours, f"--train.steps={STEPS}")
    two.wait_until(lambda: "resuming" in two.said[0])  # and compiling the step
    two.processes[1].send_signal(signal.SIGTERM)
    told["stopped"] = two.wait(), two.said, max(steps_in(workdir))

    endless = (f"--train.steps={1000 * STEPS}", "--checkpoint.every=0")
    four = Processes(4, *ours, *endless)
    four.wait_until(reached(workdir, told["stopped"][2] + 1))
    four.processes[2].kill()
    began = time.monotonic()
    told["killed"] = four.wait(60), four.said, time.monotonic() - began
    told["steps"] = steps_in(workdir)

    last = Processes(2, *ours, f"--train.steps={STEPS}")
    with Strangers(last.port + 1, count=1000, pause_s=0.002) as strangers:  # at the roll call
        told["finished"] = last.wait(), last.said
    told["strangers"] = strangers.opened
    return workdir, told


def test_a_signal_to_one_process_stops_all_at_the_same_step(story):
    codes, said, step = story[1]["stopped"]
    assert codes == [143, 143], said
    assert f"stopped by signal 15 at step {step}\n" in said[0] and 2 < step < STEPS
    assert "stopped" not in said[1]  # one of them speaks


def test_the_others_name_a_killed_process_and_leave(story):
    codes, said, seconds = story[1]["killed"]
    assert codes[2] == -signal.SIGKILL and seconds < 60
    for i in (0, 1, 3):
        assert codes[i] == 1, said
        assert "error: process 2 is gone; run the same command to resume" in said[i]
        assert "Traceback" not in said[i]
    stopped_at = story[1]["stopped"][2]
    assert story[1]["steps"] == [2, stopped_at]  # what it did after that is lost


def test_one_two_and_four_processes_make_the_same_run_bit_for_bit(whole, story):
    workdir, told = story
    assert told["finished"][0] == [0, 0], told["finished"][1]
    assert rows(workdir) == rows(whole[0]) and len(rows(workdir)) == STEPS
    written = lambda folder: {p.name: p.read_text() for p in (folder / "samples").iterdir()}
    assert written(workdir) == written(whole[0])
    assert sorted(written(workdir)) == [f"step_{step:08}.txt" for step in (3, 6, 8)]

    def saved(folder, what):
        return json.loads((folder / "checkpoints" / str(STEPS) / what / "metadata").read_text())

    assert saved(workdir, "data") == saved(whole[0], "data")  # the position of all eight rows
    assert len(saved(workdir, "data")["cursors"]) == 8
    ours, theirs = (saved(folder, "checksums") for folder in (workdir, whole[0]))
    different = {name for name in ours if ours[name] != theirs[name]}
    assert different == {"clock"} and len(ours) > 20  # every array of the state


def test_strangers_at_the_roll_call_leave_no_trace(story):
    told = story[1]  # and the numbers are those of the run above
    assert told["strangers"] > 100 and told["finished"][0] == [0, 0]
    assert not any(
        text in said for said in told["finished"][1] for text in ("liar", "\x1b", "over")
    )


def test_what_is_written_once(story):
    workdir = story[0]
    assert (workdir / "plots" / "loss.png").exists()
    assert "distributed" not in (workdir / "flags.txt").read_text()
    assert json.loads((workdir / "run.json").read_text())["processes"] == 2
    boards = [path.name for path in (workdir / "tensorboard").iterdir()]
    assert len(boards) == 4  # of four lives; not one a process


def test_a_worker_that_never_joins_is_named_by_the_command(tmp_path):
    place = (f"--distributed.coordinator=localhost:{free_port()}", "--distributed.num_processes=2")
    ours = (*place, "--distributed.process_id=0", "--distributed.timeout_s=1")
    _, err = run("train", *ours, f"--workdir={tmp_path}", code=2)
    assert err.strip() == "error: process 1 of 2 did not join within 1 s"


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    """A flow whose parameters were split over two devices."""
    workdir = tmp_path_factory.mktemp("flow")
    flags = (
        "--task=normalizing_flow", "--data.batch_size=8", "--glow.steps_per_level=1",
        "--glow.hidden_channels=4", "--mesh.data=4", "--mesh.fsdp=2", "--train.steps=1",
        "--eval.batches=0", "--train.progress=false",
    )  # fmt: skip
    run("train", *flags, f"--workdir={workdir}", devices=8)
    return workdir


def test_images_are_sampled_by_two_processes_as_by_one(flow, tmp_path):
    flags = (f"--workdir={flow}", "--num_samples=8")
    run("sample", *flags, f"--output={tmp_path / 'one.png'}")
    two = Processes(2, *flags, f"--output={tmp_path / 'two.png'}", command="sample")
    assert two.wait() == [0, 0], two.said
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_a_run_is_evaluated_and_sampled_by_two_processes_as_by_one(whole):
    workdir = f"--workdir={whole[0]}"
    request = ("--prompt=the cat", "--num_samples=3", "--max_tokens=12", "--temperature=0.8")
    for command, flags in (("evaluate", ("--batches=2",)), ("sample", request)):
        alone, _ = run(command, workdir, *flags)
        two = Processes(2, workdir, *flags, command=command)
        assert two.wait() == [0, 0], two.said
        assert two.printed[1] == ""  # one of them prints
        if command == "sample":
            assert two.printed[0] == alone and alone.count("the cat") == 3
            continue
        ours, theirs = json.loads(two.printed[0]), json.loads(alone)
        assert ours.keys() == theirs.keys()
        assert ours["tokens"] == theirs["tokens"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
