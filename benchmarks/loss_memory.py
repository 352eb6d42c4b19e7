"""Temporary memory of the compiled step with a chunked loss, compared with all logits at once.

    python -m benchmarks.loss_memory

Batch 8, length 1024, vocabulary 32,768, and a network small enough for the loss to dominate. The
programs are not run: the numbers are the compiler's own (`memory_analysis`).
"""

import json
import sys

import jax

from benchmarks.compile_time import batch_shapes
from genai_jax.components import parse_run
from genai_jax.tasks.language.causal import LanguageModel
from genai_jax.training.execution import build
from genai_jax.training.sharding import make_mesh, mesh_context

VOCABULARY = 32_768
FLAGS = (
    "--data.batch_size=8",
    "--data.sequence_length=1024",
    "--transformer.num_layers=2",
    "--transformer.embed_dim=128",
    "--transformer.num_heads=2",
    "--transformer.remat=full",
    f"--language_model.vocab_size={VOCABULARY}",
)


def temporary_bytes(*flags: str) -> int:
    config = parse_run([*FLAGS, *flags])
    task = LanguageModel(config)
    mesh = make_mesh(config.mesh)
    compiled = build(task, config, mesh)
    with mesh_context(mesh):
        program = compiled.step.lower(compiled.shapes, batch_shapes(task)).compile()
    return program.memory_analysis().temp_size_in_bytes


def main(flags: tuple[str, ...] = ()) -> dict:
    sizes = {
        "unchunked": temporary_bytes("--language_model.loss_chunk=0", *flags),
        "default": temporary_bytes(*flags),
        "chunk_32": temporary_bytes("--language_model.loss_chunk=32", *flags),
    }
    return {
        "temporary_mib": {name: size / 2**20 for name, size in sizes.items()},
        "share_of_unchunked": {name: size / sizes["unchunked"] for name, size in sizes.items()},
        "logits_mib": 8 * 1024 * VOCABULARY * 4 / 2**20,
        "versions": {"jax": jax.__version__},
    }


if __name__ == "__main__":
    print(json.dumps(main(tuple(sys.argv[1:])), indent=2))
