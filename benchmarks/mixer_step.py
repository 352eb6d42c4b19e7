"""Speed of the training step of sequence mixers at the quickstart's size, beside attention.

    python -m benchmarks.mixer_step

Every round times a matmul, the step of each network, and the selective scans of a step of Mamba,
forward and backward, which are not matmuls. Shares are the FLOPs that a run reports, divided by the
time and by the rate of the matmul; medians of rounds.
"""

import json
import statistics
import sys

import jax
import jax.numpy as jnp
import numpy as np

import kernels_pallas
from benchmarks.train_step import MATMUL_SIZE, seconds_of
from genai_jax.components import parse_run
from genai_jax.networks.sequence.flops import transformer_forward_flops
from genai_jax.tasks.language.causal import LanguageModel
from genai_jax.training.execution import build
from genai_jax.training.sharding import make_mesh, mesh_context

FOLDER = "experiments/sequences"
NAMES = ("transformer", "mamba", "mamba2", "s4d", "rg_lru", "lstm")


def step_of(name: str):
    """(function that runs one step, FLOPs of a step) of a flagfile."""
    config = parse_run([f"--flagfile={FOLDER}/{name}.flags"])
    task = LanguageModel(config)
    batches = task.data.train()
    batch = {key: jnp.asarray(x) for key, x in next(batches).items()}
    batches.close()
    mesh = make_mesh(config.mesh)
    compiled = build(task, config, mesh)
    with mesh_context(mesh):
        state = compiled.init(jax.random.key(0))
        step = compiled.step.lower(state, batch).compile()

    def once():
        nonlocal state
        state, report = step(state, batch)
        return report.metrics["loss"]

    return once, task.flops_per_step()["flops_per_step"]


def scans():
    """A function that runs the selective scans of `mamba.flags`, forward and backward."""
    config = parse_run([f"--flagfile={FOLDER}/mamba.flags"])
    shape, data = config.transformer, config.data
    inner, states = (shape.expand or 2) * shape.embed_dim, shape.state_dim or 16
    rng = np.random.default_rng(0)
    normal = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)
    rows, length = data.batch_size, data.sequence_length
    x, delta = normal(rows, length, inner), jax.nn.softplus(normal(rows, length, inner) - 4)
    a = -jnp.broadcast_to(jnp.arange(1.0, states + 1), (inner, states))
    inputs = (x, delta, a, normal(rows, length, states), normal(rows, length, states))
    total = lambda *inputs: jnp.sum(kernels_pallas.selective_scan(*inputs)[0])
    gradient = jax.jit(jax.grad(total, argnums=tuple(range(5))))
    return lambda: [gradient(*inputs) for _ in range(shape.num_layers)]


def scans_of_flops() -> float:
    """The share of the scans, and of the short convolutions, in the FLOPs of `mamba.flags`."""
    config = parse_run([f"--flagfile={FOLDER}/mamba.flags"])
    parts = transformer_forward_flops(config.transformer, 256, config.data.sequence_length)
    return parts["recurrence"] / sum(parts.values())


def main(rounds: int = 9) -> dict:
    steps = {name: step_of(name) for name in NAMES}
    matrix = jax.random.normal(jax.random.key(1), (MATMUL_SIZE, MATMUL_SIZE))
    multiply, scan = jax.jit(jnp.matmul), scans()
    multiplying = lambda: multiply(matrix, matrix)
    for once in (multiplying, scan, *(once for once, _ in steps.values())):
        seconds_of(once), seconds_of(once)
    rates, scan_share, rest = [], [], []
    times, shares = ({name: [] for name in steps} for _ in range(2))
    for _ in range(rounds):
        for name, (once, flops) in steps.items():
            rates.append(2 * MATMUL_SIZE**3 / min(seconds_of(multiplying) for _ in range(2)))
            times[name].append(seconds_of(once))
            shares[name].append(flops / times[name][-1] / rates[-1])
        scan_share.append(seconds_of(scan) / times["mamba"][-1])
        rest.append(shares["mamba"][-1] * (1 - scans_of_flops()) / (1 - scan_share[-1]))
    return {
        "matmul_gflops_per_second": statistics.median(rates) / 1e9,
        "rounds": rounds,
        **{
            name: {
                "step_seconds": statistics.median(times[name]),
                "share_of_matmul": statistics.median(shares[name]),
            }
            for name in steps
        },
        "selective_scans_of_mamba_step": statistics.median(scan_share),
        "share_of_matmul_of_mamba_without_scans": statistics.median(rest),
        "versions": {"jax": jax.__version__},
    }


if __name__ == "__main__":
    print(json.dumps(main(*map(int, sys.argv[1:2])), indent=2))
