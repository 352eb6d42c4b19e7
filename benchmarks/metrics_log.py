"""Time and memory of a resume, and of the plot at a run's end, by the length of metrics.jsonl.

    python -m benchmarks.metrics_log [--rows=1000000]

Writes rows of a language model's usual metrics, one in 1,000 of them with held-out metrics, and
opens the file as a run does that goes on 1,000 rows before its end; then plots it. Each is a
process of its own. Beside them stand what both took before: every row parsed into memory, the rest
written to a new file, and every point plotted. Prints a JSON object: processor seconds, and the
peak of resident memory above that of a process that imported the same modules and did nothing.
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

TAKES_BACK = 1000  # rows after the checkpoint


def write_rows(path: pathlib.Path, count: int):
    names = ("train/loss", "train/grad_norm", "train/learning_rate", "train/accuracy")
    names += tuple(f"perf/{n}" for n in ("step_time_s", "examples_per_second", "mfu"))
    with open(path, "w", encoding="utf-8") as file:
        for step in range(1, count + 1):
            row = {"step": step} | {name: 1 / (step + i) for i, name in enumerate(names)}
            if step % 1000 == 0:
                row |= {"eval/loss": 2 / step, "eval/bits_per_byte": 3 / step}
            file.write(json.dumps(row) + "\n")


class Model:
    """What the plot needs to know of a task."""

    loss_unit, curves = "nats per token", {}


def nothing(workdir: pathlib.Path, step: int):
    pass


def resume(workdir: pathlib.Path, step: int):
    from genai_jax.training.metrics_log import MetricsLog

    MetricsLog(workdir, step).close()


def resume_before(workdir: pathlib.Path, step: int):
    path = workdir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, path)


def plot(workdir: pathlib.Path, step: int):
    from genai_jax.training.plots import plot_metrics

    plot_metrics(workdir, Model)


def plot_before(workdir: pathlib.Path, step: int):
    from genai_jax.training import plots

    text = (workdir / "metrics.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    plots._plot(workdir, "loss", rows, ("loss",), "loss")


CASES = (nothing, resume, resume_before, plot, plot_before)


def measured(case: str, workdir: pathlib.Path, step: int) -> dict[str, float]:
    """Processor seconds and peak memory of a case, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.metrics_log", f"--case={case}"]
    command += [f"--workdir={workdir}", f"--step={step}"]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def run_case(case: str, workdir: pathlib.Path, step: int):
    import matplotlib.pyplot  # noqa: F401
    from tensorboardX import SummaryWriter  # noqa: F401

    from genai_jax.training import plots  # noqa: F401

    began, wall = time.process_time(), time.perf_counter()
    globals()[case](workdir, step)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # of kB on Linux
    seconds = time.process_time() - began
    print(json.dumps({"cpu_s": seconds, "wall_s": time.perf_counter() - wall, "peak_mb": peak}))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--case")
    parser.add_argument("--workdir", type=pathlib.Path)
    parser.add_argument("--step", type=int)
    options = parser.parse_args()
    if options.case:
        run_case(options.case, options.workdir, options.step)
        return
    step = max(options.rows - TAKES_BACK, 1)
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder)
        write_rows(workdir / "metrics.jsonl", options.rows)
        size = os.stat(workdir / "metrics.jsonl").st_size / 2**20
        report = {"rows": options.rows, "file_mb": size}
        for case in CASES:
            report[case.__name__] = measured(case.__name__, workdir, step)
    idle = report.pop("nothing")["peak_mb"]
    for case in report.values():
        if isinstance(case, dict):
            case["memory_mb"] = case.pop("peak_mb") - idle
    rounded = lambda x: {k: round(v, 2) for k, v in x.items()} if isinstance(x, dict) else round(x)
    print(json.dumps({name: rounded(value) for name, value in report.items()}))


if __name__ == "__main__":
    main()
