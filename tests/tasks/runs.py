"""Real runs, in this process, and what they leave."""

import json
import pathlib
import shutil

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
    shapes = state_shapes(task, task.config, mesh)
    return initial_parts(task, task.config, shapes, shapes)["params"]


def steps_in(workdir) -> list[int]:
    """The steps of which there are checkpoints."""
    folder = pathlib.Path(workdir) / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def copy_until(whole, step: int, workdir):
    """A copy of the run as it was when `step` was saved; its metrics go further."""
    shutil.copytree(whole, workdir, dirs_exist_ok=True)
    for later in steps_in(workdir):
        if later > step:
            shutil.rmtree(workdir / "checkpoints" / str(later))
    assert steps_in(workdir)[-1] == step


def resumed(whole, step: int, workdir, steps: int, *flags: str) -> list[dict]:
    """What `run_to` returns of a copy of the run that goes on from its checkpoint of `step`."""
    copy_until(whole, step, workdir)
    return run_to(workdir, steps, *flags)
