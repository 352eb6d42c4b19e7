"""DiT-B/2 on 32x32x4 latents: memory of a training step with remat, and compile time by depth.

    python -m benchmarks.dit

The programs are compiled but not run. Memory is the compiler's count of temporary bytes, compared
with the step without remat. The ratio of compile times is that of 24 blocks to 6, with scanned
layers.
"""

import dataclasses
import json
import statistics
import time

import jax
import jax.numpy as jnp
import optax

from genai_jax.networks.image.conditioning import Condition
from genai_jax.networks.image.dit import Dit, DitConfig

BATCH, LATENT, CLASSES = 8, (32, 32, 4), 1000
B2 = DitConfig(patch_size=2, num_layers=12, embed_dim=768, num_heads=12)


def lowered(config: DitConfig):
    """One step of flow matching with AdamW, lowered from shapes."""
    model = Dit(config, LATENT[-1], label_sizes=(CLASSES,))
    optimizer = optax.adamw(1e-4)
    x = jax.ShapeDtypeStruct((BATCH, *LATENT), jnp.float32)
    t = jax.ShapeDtypeStruct((BATCH,), jnp.float32)
    labels = jax.ShapeDtypeStruct((BATCH, 1), jnp.int32)

    def step(params, moments, x, noise, t, labels):
        def loss(params):
            mix = t[:, None, None, None]
            noisy = (1 - mix) * x + mix * noise
            output = model.apply({"params": params}, noisy, 1000 * t, Condition(labels=labels))
            return jnp.mean(jnp.square(output - (noise - x)))

        updates, moments = optimizer.update(jax.grad(loss)(params), moments, params)
        return optax.apply_updates(params, updates), moments

    shapes = jax.eval_shape(
        lambda key: model.init(
            key, jnp.zeros(x.shape), jnp.zeros(BATCH), Condition(labels=jnp.zeros((BATCH, 1), int))
        )["params"],
        jax.random.key(0),
    )
    moments = jax.eval_shape(optimizer.init, shapes)
    return jax.jit(step, donate_argnums=(0, 1)).lower(shapes, moments, x, x, t, labels)


def temporary_mib(remat: str) -> float:
    compiled = lowered(dataclasses.replace(B2, remat=remat)).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def compile_seconds(layers: int) -> float:
    """Seconds for tracing, lowering and compiling, without the persistent cache."""
    jax.clear_caches()
    start = time.perf_counter()
    lowered(dataclasses.replace(B2, num_layers=layers, remat="full")).compile()
    return time.perf_counter() - start


def main(rounds: int = 3) -> dict:
    jax.config.update("jax_enable_compilation_cache", False)
    compile_seconds(6)
    pairs = [(compile_seconds(6), compile_seconds(24)) for _ in range(rounds)]
    return {
        "temporary_mib": {remat: temporary_mib(remat) for remat in ("none", "full")},
        "compile_seconds": {
            "6": statistics.median(p[0] for p in pairs),
            "24": statistics.median(p[1] for p in pairs),
            "ratio": statistics.median(p[1] / p[0] for p in pairs),
        },
        "batch": BATCH,
        "versions": {"jax": jax.__version__},
    }


if __name__ == "__main__":
    print(json.dumps(main(), indent=2))
