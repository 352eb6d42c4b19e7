"""Trains a quantized autoencoder on 1 and 8 simulated devices; prints the differences as JSON."""

import json
import sys

import jax
import numpy as np

sys.path.insert(0, ".")

from genai_jax.components import parse_run
from genai_jax.tasks.autoencoder.task import Autoencoder
from genai_jax.training.execution import build
from genai_jax.training.sharding import MeshConfig, make_mesh, mesh_context

FLAGS = (
    "--task=autoencoder",
    "--data.batch_size=16",
    "--autoencoder.latent=rvq",
    "--autoencoder.channels=8",
    "--quantizer.codebooks=2",
    "--quantizer.codes=16",
    "--quantizer.decay=0.9",
    "--quantizer.restart_below=0.3",  # so that codes do restart
    "--optimizer.warmup_steps=0",
    "--optimizer.epsilon=1e-3",  # Adam's sign-like first steps would magnify rounding
)
STEPS = 4


def trained(mesh_config: MeshConfig, devices):
    """The state after a few steps on a mesh."""
    config = parse_run(FLAGS)
    task = Autoencoder(config)
    compiled = build(task, config, make_mesh(mesh_config, devices))
    source = task.data.loader.open("train")
    with mesh_context(compiled.mesh):
        state = compiled.init(jax.random.key(0))
        for step in range(STEPS):
            rows = np.arange(16 * step, 16 * (step + 1))
            batch = jax.device_put(task.data.loader.gather(source, rows), compiled.batch_shardings)
            state, _ = compiled.step(state, batch)
    return state


def difference(a, b) -> float:
    """Largest difference of any two leaves."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.max(np.abs(np.asarray(x, float) - np.asarray(y, float)))) for x, y in pairs)


def vq_difference() -> dict:
    """Largest differences between 1 and 8 devices, of the codebooks and of the parameters."""
    one = trained(MeshConfig(), jax.devices()[:1])
    report = {}
    for name, mesh in {"data": MeshConfig(data=8), "fsdp": MeshConfig(data=2, fsdp=4)}.items():
        other = trained(mesh, jax.devices())
        report[name] = {
            "codebooks": difference(one.mutables, other.mutables),
            "params": difference(one.params, other.params),
        }
    return report


if __name__ == "__main__":
    assert jax.device_count() == 8, jax.devices()
    print(json.dumps(vq_difference()))
