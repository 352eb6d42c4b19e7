"""Time that a run of two processes takes from the death of one process to its next new step.

    python -m benchmarks.restart

Trains a small transformer in two processes on this machine, kills one of them (SIGKILL) some steps
after a checkpoint, waits until the other one exits by itself, starts the same two commands again,
and waits for the first row of metrics after the checkpoint. Prints a JSON object. Times are
wall-clock seconds, measured by polling files and processes every 10 ms. Most of the time goes into
imports and compilation, for which the persistent cache does not help on CPUs.
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

FLAGS = (
    "--data.batch_size=8",
    "--data.sequence_length=64",
    "--transformer.num_layers=1",
    "--transformer.embed_dim=64",
    "--transformer.num_heads=2",
    "--train.steps=100000",
    "--train.log_every=1",
    "--train.progress=false",
    "--eval.batches=0",
    "--checkpoint.every=5",
    "--optimizer.schedule=rsqrt",
)
DEVICES = 4  # simulated devices per process


def start(workdir: pathlib.Path) -> list[subprocess.Popen]:
    """Starts two processes of one run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = (f"--distributed.coordinator=127.0.0.1:{port}", "--distributed.num_processes=2")
    command = [sys.executable, "-m", "genai_jax.train", *FLAGS, *place, f"--workdir={workdir}"]
    ours = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(DEVICES),
    }
    return [
        subprocess.Popen(
            [*command, f"--distributed.process_id={index}"],
            env=os.environ | ours,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]


def last_step(workdir: pathlib.Path) -> int:
    """The step of the last complete row of metrics."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def saved(workdir: pathlib.Path) -> int:
    """The step of the newest complete checkpoint."""
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return max((int(name) for name in names if name.isdigit()), default=0)


def wait_until(condition: Callable[[], bool], processes: list[subprocess.Popen]) -> float:
    """Waits for a condition and returns the time at which it became true."""
    while not condition():
        for process in processes:
            if process.poll() is not None:
                raise SystemExit(f"a process exited too early: {process.communicate()[1]}")
        time.sleep(0.01)
    return time.perf_counter()


def main():
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder)
        began = time.perf_counter()
        first = start(workdir)
        started = wait_until(lambda: last_step(workdir) >= 1, first)
        wait_until(lambda: saved(workdir) and last_step(workdir) > saved(workdir), first)
        first[1].send_signal(signal.SIGKILL)
        killed = time.perf_counter()
        _, said = first[0].communicate()
        gone = time.perf_counter()
        first[1].communicate()
        step, reached = saved(workdir), last_step(workdir)
        second = start(workdir)
        # The file is truncated to the checkpoint before the first new row is written.
        wait_until(lambda: last_step(workdir) <= step, second)
        resumed = wait_until(lambda: last_step(workdir) > step, second)
        for process in second:
            process.kill()
            process.communicate()
    report = {
        "survivor_exit_code": first[0].returncode,
        "survivor_said": [line for line in said.splitlines() if line.startswith("error:")],
        "checkpoint": step,
        "steps_lost": reached - step,
        "first_start_to_step_1_s": started - began,
        "kill_to_exit_of_the_other_s": gone - killed,
        "restart_to_resumed_step_s": resumed - gone,
        "kill_to_resumed_step_s": resumed - killed,
    }
    print(json.dumps({k: round(v, 2) if isinstance(v, float) else v for k, v in report.items()}))


if __name__ == "__main__":
    main()
