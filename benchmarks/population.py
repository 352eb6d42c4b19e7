"""Throughput of a population of 8 compared with 8 runs one after another.

    python -m benchmarks.population [--members=8 --embed_dim=64 --steps=200]

Both train the same small transformer. "steps_alone" times only the compiled steps, alternating in
one process; "whole_commands" times whole train commands, including start-up and compilation. Prints
JSON.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax

from genai_jax.components import parse_run
from genai_jax.tasks.language.causal import LanguageModel
from genai_jax.training.batches import BatchPlacement, DeviceBatches
from genai_jax.training.execution import SingleRun
from genai_jax.training.population import Population
from genai_jax.training.sharding import make_mesh, mesh_context


def flags(arguments: argparse.Namespace) -> list[str]:
    return [
        f"--data.batch_size={arguments.batch_size}",
        f"--data.sequence_length={arguments.sequence_length}",
        "--transformer.num_layers=2",
        f"--transformer.embed_dim={arguments.embed_dim}",
        "--transformer.num_heads=2",
        "--transformer.scan_layers=false",
        f"--train.steps={arguments.steps}",
        "--train.progress=false",
        "--train.log_every=50",
        "--eval.batches=0",
        "--checkpoint.every=0",
    ]


class Stepper:
    """A run or a population with its compiled step and its batches."""

    def __init__(self, arguments: list[str]):
        config = parse_run(arguments)
        self.mesh = make_mesh(config.mesh)
        kind = Population if config.population.size > 1 else SingleRun
        execution = kind(LanguageModel(config), config, self.mesh)
        self.step, self.tokens = execution.compiled.step, execution.tokens
        placement = BatchPlacement(execution.batch_spec(), execution.data_shardings())
        self.batches = DeviceBatches(execution.train(placement.rows), placement)
        with mesh_context(self.mesh):
            self.state = execution.begin()

    def tokens_per_second(self, steps: int) -> float:
        start = time.perf_counter()
        with mesh_context(self.mesh):
            for _ in range(steps):
                self.state, report = self.step(self.state, next(self.batches))
            jax.block_until_ready(report)
        return steps * self.tokens / (time.perf_counter() - start)


def compare_steps(base: list[str], members: int, rounds: int = 7, steps: int = 40) -> dict:
    one, all_ = Stepper(base), Stepper([*base, f"--population.size={members}"])
    for stepper in (one, all_):
        stepper.tokens_per_second(3)  # compiles
    rates = [(one.tokens_per_second(steps), all_.tokens_per_second(steps)) for _ in range(rounds)]
    single, population = (statistics.median(r) for r in zip(*rates, strict=True))
    return {
        "single_tokens_per_second": round(single),
        "population_tokens_per_second": round(population),
        "ratio": round(statistics.median(p / s for s, p in rates), 2),
    }


def compare_commands(base: list[str], members: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:

        def seconds(name: str, *more: str) -> float:
            start = time.perf_counter()
            workdir = f"--workdir={pathlib.Path(folder) / name}"
            command = [sys.executable, "-m", "genai_jax.train", *base, *more, workdir]
            subprocess.run(command, check=True)
            return time.perf_counter() - start

        population = seconds("all", f"--population.size={members}")
        separate = sum(seconds(str(k), f"--seed={k}") for k in range(members))
    return {
        "one_after_another_s": round(separate, 1),
        "population_s": round(population, 1),
        "ratio": round(separate / population, 2),
    }


def main():
    parser = argparse.ArgumentParser()
    for name, value in {
        "members": 8, "embed_dim": 64, "batch_size": 4, "sequence_length": 64, "steps": 200,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    base = flags(arguments)
    result = {
        **vars(arguments),
        "steps_alone": compare_steps(base, arguments.members),
        "whole_commands": compare_commands(base, arguments.members),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
