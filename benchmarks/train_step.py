"""Speed of the training step relative to the matmul rate of the same machine.

    python -m benchmarks.train_step

Model FLOPs are 6 x parameters x tokens + 6 x layers x width x length x tokens (causal attention,
halved). Every round times a matmul, our step, and a plain Flax decoder with the same shapes
(`flax.linen.Dense` and `flax.linen.dot_product_attention`), one after another. Reported are the
medians of the per-round ratios to the matmul.
"""

import json
import statistics
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from genai_jax.components import parse_run
from genai_jax.tasks.language.causal import LanguageModel
from genai_jax.training.execution import build
from genai_jax.training.sharding import make_mesh, mesh_context

LAYERS, WIDTH, HEADS, LENGTH, BATCH, SYMBOLS = 4, 256, 4, 256, 8, 256
FLAGS = (
    f"--data.batch_size={BATCH}",
    f"--data.sequence_length={LENGTH}",
    f"--transformer.num_layers={LAYERS}",
    f"--transformer.embed_dim={WIDTH}",
    f"--transformer.num_heads={HEADS}",
    "--transformer.scan_layers=false",
    "--optimizer.name=adamw",
)
MATMUL_SIZE = 2048


def model_flops(parameters: int) -> float:
    tokens = BATCH * LENGTH
    return 6 * parameters * tokens + 6 * LAYERS * WIDTH * LENGTH * tokens


def our_step(batch: dict, flags: tuple[str, ...]):
    """(function that runs one step, number of parameters)."""
    config = parse_run([*FLAGS, *flags])
    task = LanguageModel(config)
    mesh = make_mesh(config.mesh)
    compiled = build(task, config, mesh)
    with mesh_context(mesh):
        state = compiled.init(jax.random.key(0))
        step = compiled.step.lower(state, batch).compile()

    def once():
        nonlocal state
        state, report = step(state, batch)
        return report.metrics["loss"]

    return once, sum(x.size for x in jax.tree.leaves(state.params))


class PlainDecoder(nn.Module):
    """The same decoder in the plainest Flax, for comparison."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(SYMBOLS, WIDTH)(tokens) + nn.Embed(LENGTH, WIDTH)(jnp.arange(LENGTH))
        mask = nn.make_causal_mask(tokens)
        for _ in range(LAYERS):
            h = nn.LayerNorm(use_bias=False)(x)
            q, k, v = (nn.DenseGeneral((HEADS, WIDTH // HEADS), use_bias=False)(h) for _ in "qkv")
            h = nn.dot_product_attention(q, k, v, mask=mask)
            x = x + nn.DenseGeneral(WIDTH, axis=(-2, -1), use_bias=False)(h)
            h = nn.Dense(4 * WIDTH, use_bias=False)(nn.LayerNorm(use_bias=False)(x))
            x = x + nn.Dense(WIDTH, use_bias=False)(nn.gelu(h))
        return nn.Dense(SYMBOLS, use_bias=False)(nn.LayerNorm(use_bias=False)(x))


def plain_step(batch: dict):
    """(function that runs one step, number of parameters) of `PlainDecoder`."""
    model, optimizer = PlainDecoder(), optax.adamw(1e-3)
    params = model.init(jax.random.key(0), batch["tokens"])
    opt_state = optimizer.init(params)

    def loss(params):
        logits = model.apply(params, batch["tokens"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()

    @jax.jit
    def step(params, opt_state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    def once():
        nonlocal params, opt_state
        params, opt_state, value = step(params, opt_state)
        return value

    return once, sum(x.size for x in jax.tree.leaves(params))


def seconds_of(function) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def main(flags: tuple[str, ...] = (), rounds: int = 15) -> dict:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, SYMBOLS, (BATCH, LENGTH + 1), dtype=np.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones((BATCH, LENGTH), np.int32),
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (BATCH, LENGTH)),
        "loss_mask": np.ones((BATCH, LENGTH), np.float32),
    }
    batch = {name: jnp.asarray(x) for name, x in batch.items()}
    matrix = jax.random.normal(jax.random.key(1), (MATMUL_SIZE, MATMUL_SIZE))
    multiply = jax.jit(jnp.matmul)
    steps = {"genai_jax": our_step(batch, flags), "plain_flax": plain_step(batch)}
    for once, _ in steps.values():
        seconds_of(once), seconds_of(once)
    seconds_of(lambda: multiply(matrix, matrix))
    rates, times = {"matmul": []}, {name: [] for name in steps}
    ratios = {name: [] for name in steps}
    for _ in range(rounds):
        for name, (once, parameters) in steps.items():
            matmul = min(seconds_of(lambda: multiply(matrix, matrix)) for _ in range(2))
            rates["matmul"].append(2 * MATMUL_SIZE**3 / matmul)
            times[name].append(seconds_of(once))
            rate = model_flops(parameters) / times[name][-1]
            ratios[name].append(rate / rates["matmul"][-1])
    return {
        "matmul_gflops_per_second": statistics.median(rates["matmul"]) / 1e9,
        "rounds": rounds,
        **{
            name: {
                "parameters": steps[name][1],
                "step_seconds": statistics.median(times[name]),
                "share_of_matmul": statistics.median(ratios[name]),
            }
            for name in steps
        },
        "versions": {"jax": jax.__version__},
        "flags": list(flags),
    }


if __name__ == "__main__":
    print(json.dumps(main(tuple(sys.argv[1:])), indent=2))
