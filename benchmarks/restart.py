"""How long a run of two processes takes from the death of one to its next step.

Starts two processes of a small transformer on this machine, kills one (SIGKILL) some steps after a
checkpoint, waits until the other has left by itself, starts the same two commands again, and waits
for the first row of metrics behind the checkpoint. Prints a JSON object; times are wall-clock
seconds of this process, read from the files and the exits of the others (every 10 ms). Most of it
is imports and compilation, which on CPU finds nothing in the persistent cache.
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
DEVICES = 4  # simulated ones, of each process


def start(workdir: pathlib.Path) -> list[subprocess.Popen]:
    """Two processes of one run."""
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
    """Of the last whole row of the metrics."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def saved(workdir: pathlib.Path) -> int:
    """The newest checkpoint that is whole."""
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return max((int(name) for name in names if name.isdigit()), default=0)


def wait_until(condition: Callable[[], bool], processes: list[subprocess.Popen]) -> float:
    """The time at which a condition came true."""
    while not condition():
        for process in processes:
            if process.poll() is not None:
                raise SystemExit(f"a process ended too early: {process.communicate()[1]}")
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
        # The file is cut back to the checkpoint before the first new row is written.
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
