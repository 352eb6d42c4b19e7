"""Resident memory of a long run: at step 1,000 and at its end.

    python -m benchmarks.resident_memory [--train.steps=20000 ...]

Trains a tiny transformer on text in a process of its own, with evaluations, checkpoints, and
logging, and reads the resident set size of that process (VmRSS of /proc, in MiB) as the steps go
by. What grows would be a leak. Prints a JSON object. Linux only.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import time

FLAGS = (
    "--data.batch_size=2",
    "--data.sequence_length=16",
    "--transformer.num_layers=1",
    "--transformer.embed_dim=16",
    "--transformer.num_heads=2",
    "--train.steps=20000",
    "--train.log_every=20",
    "--train.progress=false",
    "--eval.every=1000",
    "--eval.batches=2",
    "--checkpoint.every=1000",
)
FIRST = 1000  # the step at which compilation and the first checkpoint are over


def last_step(workdir: pathlib.Path) -> int:
    """The last step that metrics.jsonl has; 0 before there is one."""
    try:
        with open(workdir / "metrics.jsonl", "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 4096))
            lines = [line for line in file.read().split(b"\n") if line.startswith(b'{"step"')]
        return json.loads(lines[-1])["step"]
    except (OSError, IndexError, ValueError):
        return 0


def resident_mib(process: int) -> float:
    """Resident set size of a process in MiB; 0 once it has ended."""
    try:
        text = pathlib.Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0.0
    sizes = [line.split()[1] for line in text.splitlines() if line.startswith("VmRSS")]
    return int(sizes[0]) / 1024 if sizes else 0.0


def main() -> dict:
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder) / "run"
        command = [sys.executable, "-m", "genai_jax.train", *FLAGS, *sys.argv[1:]]
        process = subprocess.Popen([*command, f"--workdir={workdir}"])
        seen: list[tuple[int, float]] = []
        while process.poll() is None:
            step, size = last_step(workdir), resident_mib(process.pid)
            if size and step >= FIRST:
                seen.append((step, size))
            time.sleep(0.5)
    if process.returncode or not seen:
        raise SystemExit(f"the run ended with {process.returncode}")
    quarter = max(1, len(seen) // 4)
    return {
        "step": seen[0][0], "mib": round(seen[0][1], 1),
        "last_step": seen[-1][0], "last_mib": round(seen[-1][1], 1),
        "most_mib": round(max(size for _, size in seen), 1),
        "mean_mib_of_each_quarter": [
            round(sum(size for _, size in part) / len(part), 1)
            for part in (seen[i : i + quarter] for i in range(0, 4 * quarter, quarter))
        ],
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main()))
