"""Runs of a tiny model and results made up for them, so that the right conclusion is known."""

import math
import pathlib

from genai_jax.components import parse_run
from genai_jax.scaling.study.folder import Counts, Run
from genai_jax.scaling.study.results import Result
from tests.commands import TINY

COUNTS = Counts(
    parameters=1000, embedding_parameters=200, active=1000, tokens_per_step=256,
    flops_per_step=1e6, convention="a test's own", loss_unit="nats per token",
)  # fmt: skip
STEPS = 8
BASE = parse_run([*TINY, f"--train.steps={STEPS}"])


def make_run(
    name: str, folder: pathlib.Path | None = None, counts: Counts = COUNTS, **flags
) -> Run:
    """A run of the tiny model; `flags` named component__field replace its own."""
    config = BASE
    for flag, value in flags.items():
        component, field = flag.split("__")
        config = config.replace(component, **{field: value})
    folder = folder or pathlib.Path("nowhere")
    return Run(name, folder / f"{name}.flags", folder, config, counts)


def make_result(run: Run, loss: float, **more) -> Result:
    """A result with `loss`, and further metrics, at the last step; diverged if it is infinite."""
    row = {"step": STEPS, "eval/loss": loss} | more
    return Result(run.name, run.config, run.counts, [row], not math.isfinite(loss))
