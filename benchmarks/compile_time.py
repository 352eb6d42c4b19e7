"""Compile time of the training step with 4 and 48 layers, scanned and unrolled.

    python -m benchmarks.compile_time

Each round compiles 4 and then 48 layers; the reported ratio is the median over rounds. The baseline
is the unrolled program, compiled once at each depth.
"""

import json
import statistics
import time

import jax

from genai_jax.components import parse_run
from genai_jax.tasks.language.causal import LanguageModel
from genai_jax.training.execution import build
from genai_jax.training.sharding import make_mesh, mesh_context

FLAGS = (
    "--data.batch_size=8",
    "--data.sequence_length=256",
    "--transformer.embed_dim=256",
    "--transformer.num_heads=4",
)


def batch_shapes(task: LanguageModel) -> dict[str, jax.ShapeDtypeStruct]:
    """The batch of a step, to compile for."""
    spec = task.data.batch_spec
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in spec.items()}


def compile_seconds(layers: int, scan: bool) -> float:
    """Seconds for tracing, lowering and compiling, without the persistent cache."""
    jax.clear_caches()
    config = parse_run(
        [*FLAGS, f"--transformer.num_layers={layers}", f"--transformer.scan_layers={scan}"]
    )
    task = LanguageModel(config)
    mesh = make_mesh(config.mesh)
    compiled = build(task, config, mesh)
    with mesh_context(mesh):
        start = time.perf_counter()
        compiled.step.lower(compiled.shapes, batch_shapes(task)).compile()
        return time.perf_counter() - start


def main(rounds: int = 5) -> dict:
    jax.config.update("jax_enable_compilation_cache", False)
    compile_seconds(4, True)
    pairs = [(compile_seconds(4, True), compile_seconds(48, True)) for _ in range(rounds)]
    unrolled = compile_seconds(4, False), compile_seconds(48, False)
    return {
        "scanned_seconds": {
            "4": statistics.median(p[0] for p in pairs),
            "48": statistics.median(p[1] for p in pairs),
            "ratio": statistics.median(p[1] / p[0] for p in pairs),
        },
        "unrolled_seconds": {
            "4": unrolled[0], "48": unrolled[1], "ratio": unrolled[1] / unrolled[0],
        },
        "rounds": rounds,
        "versions": {"jax": jax.__version__},
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main(), indent=2))
