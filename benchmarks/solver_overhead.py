"""Overhead of diffusion solvers over their network evaluations.

    python -m benchmarks.solver_overhead

Each round times a solver, and then a bare loop with the same number of evaluations of the same
U-Net on the same batch. The overhead is the median ratio minus 1.
"""

import json
import statistics
import time

import jax
import jax.numpy as jnp

from genai_jax.diffusion import schedule as schedules
from genai_jax.diffusion.parameterization import convert
from genai_jax.diffusion.solvers import SOLVERS, solve
from genai_jax.diffusion.times import time_grid
from genai_jax.networks.image.unet import Unet, UnetConfig

BATCH, STEPS = 250, 20
NETWORK = UnetConfig(
    channels=32, channel_multipliers="1,2", blocks_per_level=1, attention_resolutions="4",
    scan_blocks=False,
)  # fmt: skip
MEASURED = ("ddim", "dpmpp_2m", "unipc", "heun")


def seconds(function, *arguments) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def main(rounds: int = 7) -> dict:
    schedule = schedules.cosine()
    times = time_grid(schedule, STEPS)
    model = Unet(NETWORK, 1)
    x = jax.random.normal(jax.random.key(0), (BATCH, 8, 8, 1))
    params = jax.jit(model.init)(jax.random.key(1), x, jnp.zeros(BATCH))
    network = lambda x, t: model.apply(params, x, 1000 * t)
    denoise = lambda x, t: convert(network(x, t), "v", "x0", x, schedule, t)

    def bare(x, evaluations):
        body = lambda x, t: (network(x, jnp.full(BATCH, t)), None)
        return jax.lax.scan(body, x, jnp.linspace(1, 0, evaluations))[0]

    bare = jax.jit(bare, static_argnums=1)
    result = {}
    for name in MEASURED:
        run = jax.jit(
            lambda x, name=name: solve(name, denoise, schedule, x, times, jax.random.key(0))
        )
        evaluations = STEPS * SOLVERS[name].evaluations
        seconds(run, x), seconds(bare, x, evaluations)  # compiles
        pairs = [(seconds(run, x), seconds(bare, x, evaluations)) for _ in range(rounds)]
        result[name] = {
            "solver_seconds": statistics.median(p[0] for p in pairs),
            "evaluations_seconds": statistics.median(p[1] for p in pairs),
            "added_percent": 100 * (statistics.median(p[0] / p[1] for p in pairs) - 1),
        }
    return result | {"steps": STEPS, "batch": BATCH, "versions": {"jax": jax.__version__}}


if __name__ == "__main__":
    print(json.dumps(main(), indent=2))
