"""Real runs, in this process."""

import json
import pathlib

import jax

from genai_jax import train
from genai_jax.training.execution import state_shapes
from genai_jax.training.sharding import make_mesh
from genai_jax.training.transfer import initial_parts


def run_to(workdir, steps: int, *flags: str) -> list[dict]:
    """Trains in `workdir` to a step; returns what training logged at each."""
    common = (f"--workdir={workdir}", "--train.progress=false", "--train.log_every=1")
    assert train.main([*common, *flags, f"--train.steps={steps}"]) == 0
    lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if k.startswith(("step", "train/"))} for row in rows]


def transferred(task) -> dict:
    """What of a run's parameters does not begin as `task.init` made it, on one device."""
    mesh = make_mesh(task.config.mesh, jax.devices()[:1])
    shapes = state_shapes(task, task.config, mesh).params
    return initial_parts(task, task.config, shapes, params=shapes)
