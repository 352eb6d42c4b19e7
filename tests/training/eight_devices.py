"""Trains the same steps on 1 and on 8 simulated devices; prints the differences as JSON."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, ".")

from genai_jax.components import parse_run
from genai_jax.losses.token import token_log_probs
from genai_jax.tasks.language.causal import LanguageModel
from genai_jax.training.execution import build
from genai_jax.training.sharding import MeshConfig, make_mesh, mesh_context
from genai_jax.training.step import make_step
from tests.training.test_step import begin, dirac_gan

FLAGS = (
    "--data.batch_size=8",
    "--data.sequence_length=16",
    "--transformer.num_layers=2",
    "--transformer.embed_dim=32",
    "--transformer.num_heads=8",
    "--transformer.mlp_dim=64",
    "--transformer.dropout=0.1",
    "--language_model.loss_chunk=8",
    "--language_model.z_loss=1e-4",
    "--ema.decay=0.9",
    "--optimizer.learning_rate=1e-2",
    "--optimizer.warmup_steps=0",
    "--optimizer.epsilon=1e-3",  # Adam's sign-like first steps would magnify rounding
)
STEPS = 4


def batch_of(step: int) -> dict:
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, 256, (8, 17), dtype=np.int32)
    segments = np.repeat(np.array([[1, 2]], np.int32), 8, 1)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.broadcast_to(segments, (8, 16)),
        "positions": np.broadcast_to(np.tile(np.arange(8, dtype=np.int32), 2), (8, 16)),
        "loss_mask": (rng.uniform(size=(8, 16)) > 0.2).astype(np.float32),
    }


def trained(mesh_config: MeshConfig, devices):
    config = parse_run(FLAGS)
    mesh = make_mesh(mesh_config, devices)
    compiled = build(LanguageModel(config), config, mesh)
    with mesh_context(mesh):
        state = compiled.init(jax.random.key(0))
        for step in range(STEPS):
            batch = jax.device_put(batch_of(step), compiled.batch_shardings)
            state, _ = compiled.step(state, batch)
    return state


def difference(a, b) -> float:
    """Largest difference of any two leaves, keys by their data."""
    plain = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.max(np.abs(np.asarray(plain(x)) - np.asarray(plain(y))))) for x, y in pairs)


def dirac_difference() -> float:
    """Fifty steps of the Dirac-GAN, its state on one device and on all eight."""
    phases = dirac_gan(1.0)
    results = []
    for devices in (jax.devices()[:1], jax.devices()):
        mesh = make_mesh(MeshConfig(), devices)
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        state = jax.device_put(begin(phases, {"critic": 1.0, "generator": 1.0}), everywhere)
        step = jax.jit(make_step(phases), out_shardings=(everywhere, None))
        for _ in range(50):
            state, _ = step(state, {})
        results.append(state.params)
    return difference(*results)


def log_prob_differences() -> dict[str, dict]:
    """Log-probabilities of targets and a gradient through them, on one device and on eight."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (8, 16, 32))
    kernel = jax.random.normal(keys[1], (32, 64))
    targets = jax.random.randint(keys[2], (8, 16), 0, 64)

    def scored(hidden, kernel):
        log_probs = token_log_probs(hidden, kernel, targets, soft_cap=5.0)
        # As a preference loss weighs them: by row, not by token.
        return jnp.sum(jax.nn.sigmoid(jnp.sum(log_probs, 1) / 50)), log_probs

    gradient = jax.value_and_grad(scored, (0, 1), has_aux=True)
    one = gradient(hidden, kernel)
    results = {}
    for name, mesh_config in (
        ("mixed", MeshConfig(data=2, fsdp=2, tensor=2)),
        ("sequence", MeshConfig(data=1, fsdp=2, sequence=4)),
    ):
        with mesh_context(make_mesh(mesh_config, jax.devices())):
            eight = jax.jit(gradient)(hidden, kernel)
        split = not eight[0][1].sharding.is_fully_replicated
        results[name] = {"difference": difference(one, eight), "sharded": split}
    return results


def main():
    assert jax.device_count() == 8, jax.devices()
    one = trained(MeshConfig(), jax.devices()[:1])
    meshes = {
        "data": MeshConfig(data=8),
        "fsdp": MeshConfig(data=1, fsdp=8),
        "tensor": MeshConfig(data=1, tensor=8),
        "mixed": MeshConfig(data=2, fsdp=2, tensor=2),
    }
    report = {}
    for name, mesh in meshes.items():
        state = trained(mesh, jax.devices())
        kernel = state.opt_state["next_token"]
        split = [x for x in jax.tree.leaves(kernel) if not x.sharding.is_fully_replicated]
        report[name] = {"difference": difference(one, state), "sharded": bool(split)}
    report |= {f"log_probs_{name}": facts for name, facts in log_prob_differences().items()}
    report["dirac"] = {"difference": dirac_difference()}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
