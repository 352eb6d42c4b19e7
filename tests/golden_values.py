"""What the golden files hold: resolved flags of every flagfile, and numbers of one step."""

import contextlib
import hashlib
import math
import pathlib

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from genai_jax.components import make_task, parse_run
from genai_jax.tasks.language.causal import LanguageModel
from genai_jax.training.execution import build
from genai_jax.training.sharding import make_mesh, mesh_context, placements
from tests.conftest import ROOT

GOLDEN = ROOT / "tests" / "golden"

STEP_FLAGS = {
    "default": (),
    "gelu_learned": ("--transformer.activation=gelu", "--transformer.positions=learned"),
    "grouped_window": ("--transformer.num_kv_heads=1", "--transformer.window=5"),
    "muon": ("--optimizer.name=muon", "--language_model.z_loss=1e-3"),
}
SHAPE_FLAGS = (
    "--data.batch_size=4",
    "--data.sequence_length=16",
    "--transformer.num_layers=2",
    "--transformer.embed_dim=16",
    "--transformer.num_heads=2",
    "--optimizer.warmup_steps=0",
    "--optimizer.learning_rate=1e-2",
    "--language_model.loss_chunk=8",
)


def flagfiles() -> dict[str, pathlib.Path]:
    """Name of the golden file -> flagfile, for every flagfile of the project.

    Of a study it is what its runs have in common; they differ from it in a flag or two.
    """
    found = sorted((ROOT / "experiments").rglob("*.flags"))
    found = [p for p in found if p.name == "base.flags" or not (p.parent / "study.flags").exists()]
    return {".".join(path.relative_to(ROOT / "experiments").parts): path for path in found}


def resolved(path: pathlib.Path) -> str:
    """All flags of the run that a flagfile defines."""
    return parse_run([f"--flagfile={path}"]).to_flags(leave_out=("workdir",))


# Flagfile of experiments/pods -> how many devices its parameters are placed on.
PLACED = {
    "llama3_8b_v6e_256": 256,
    "llama3_405b_v5p_1024": 1024,
    "llama3_8b_128k_v5p_256": 256,
    "mixtral_8x7b_v5p_128": 128,
    "latent_dit_xl2_v5e_16": 16,
}


def placed(name: str) -> str:
    """The placement of every parameter of a pod experiment."""
    with contextlib.chdir(ROOT):  # paths in flagfiles are relative to the repository
        config = parse_run([f"--flagfile=experiments/pods/{name}.flags"])
        task = make_task(config)
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    sizes = config.mesh.sizes()
    rest = math.prod(size for size in sizes.values() if size != -1)
    shape = tuple(PLACED[name] // rest if size == -1 else size for size in sizes.values())
    mesh = AbstractMesh(shape, tuple(sizes), axis_types=(AxisType.Auto,) * len(shape))
    return placements(params, task.partition_rules, mesh)


def one_step(flags: tuple[str, ...]) -> dict[str, float]:
    """Loss and gradient norm of two steps, and sums over the parameters after them."""
    config = parse_run([*SHAPE_FLAGS, *flags])
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    compiled = build(LanguageModel(config), config, mesh)
    # Tokens from a hash; the weights rest on threefry, whose stream jax keeps stable.
    raw = np.frombuffer(hashlib.sha256(b"golden").digest() * 8, np.uint8)
    tokens = np.resize(raw, (4, 17)).astype(np.int32)
    ones = np.ones((4, 16), np.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": ones,
        "positions": np.cumsum(ones, 1, dtype=np.int32) - 1,
        "loss_mask": ones.astype(np.float32),
    }
    with mesh_context(mesh):
        state = compiled.init(jax.random.key(0))
        values = {}
        for step in (1, 2):
            state, report = compiled.step(state, batch)
            for name in ("loss", "grad_norm"):
                values[f"{name}_{step}"] = float(report.metrics[name])
    leaves = jax.tree.leaves(state.params)
    values["sum_of_squares"] = float(sum(np.sum(np.square(x, dtype=np.float64)) for x in leaves))
    return values
