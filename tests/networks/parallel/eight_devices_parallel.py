"""Splits the length and the layers over 8 simulated devices; prints what came out as JSON."""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, ".")

from genai_jax.components import make_task, parse_run
from genai_jax.config import ConfigError
from genai_jax.networks.experts.config import MoeConfig
from genai_jax.networks.parallel.axes import ParallelConfig
from genai_jax.networks.parallel.pipeline import pipeline
from genai_jax.networks.sequence.config import TransformerConfig
from genai_jax.networks.sequence.transformer import Transformer
from genai_jax.training.execution import build
from genai_jax.training.sharding import MeshConfig, make_mesh, mesh_context
from tests.networks.sequence.recurrence import NAME
from tests.training.eight_devices import difference

ROWS, LENGTH, STEPS = 8, 48, 2  # no other size is 48: see `whole_lengths`
COMMON = (
    f"--data.batch_size={ROWS}",
    "--ema.decay=0.9",
    "--optimizer.learning_rate=1e-2",
    "--optimizer.warmup_steps=0",
    "--optimizer.epsilon=1e-3",  # Adam's sign-like first steps would magnify rounding
)
LANGUAGE = (
    f"--data.sequence_length={LENGTH}",
    "--transformer.num_layers=4",
    "--transformer.embed_dim=32",
    "--transformer.num_heads=8",
    "--transformer.num_kv_heads=2",
    "--transformer.mlp_dim=64",
    "--transformer.window=21",
    "--transformer.attention_soft_cap=20",
    "--language_model.loss_chunk=4",
    "--language_model.z_loss=1e-4",
)
IMAGES = (
    "--task=diffusion",
    "--diffusion.network=dit",
    "--dit.num_layers=2",
    "--dit.embed_dim=16",
    "--dit.num_heads=2",
    "--dit.patch_size=2",
)
# name: (mesh, further flags)
LANGUAGE_MESHES = {
    "ring, zigzag": (dict(sequence=8),),
    "ring, contiguous": (dict(data=2, sequence=4), "--parallel.sequence_order=contiguous"),
    "ring, mixed": (dict(fsdp=2, tensor=2, sequence=2),),
    "all to all": (dict(fsdp=2, tensor=2, sequence=2), "--parallel.sequence=all_to_all"),
    "stages": (dict(stage=4, data=2), "--parallel.microbatches=2"),
    "circular, mixed": (
        dict(stage=2, fsdp=2, tensor=2), "--parallel.repeats=2", "--parallel.microbatches=4",
        "--transformer.remat=full",
    ),
}  # fmt: skip
IMAGE_MESHES = {"dit": (dict(sequence=4, stage=2),)}
REFUSED = {
    "length": (dict(sequence=8), "--data.sequence_length=20"),
    "zigzag": (dict(sequence=8), "--data.sequence_length=24"),
    "layers": (dict(data=2, stage=4), "--transformer.num_layers=6"),
    "microbatches": (dict(data=4, stage=2), "--parallel.microbatches=4"),
    "repeats": (dict(data=2, stage=4), "--parallel.repeats=2", "--transformer.num_layers=8",
                "--parallel.microbatches=2"),
    "unused": (dict(data=4, sequence=2), "--task=diffusion"),
}  # fmt: skip


def text_batch(step: int) -> dict:
    """Two documents a row, and some targets that do not count."""
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, 256, (ROWS, LENGTH + 1), dtype=np.int32)
    lengths = 29, LENGTH - 29
    wide = lambda parts: np.broadcast_to(np.concatenate(parts).astype(np.int32), (ROWS, LENGTH))
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": wide([np.full(n, i + 1) for i, n in enumerate(lengths)]),
        "positions": wide([np.arange(n) for n in lengths]),
        "loss_mask": (rng.uniform(size=(ROWS, LENGTH)) > 0.2).astype(np.float32),
    }


def made(mesh: dict, *flags: str):
    """(task, compiled) of a run on the first devices that the mesh needs."""
    config = parse_run((*COMMON, *flags))
    task = make_task(config)
    devices = jax.devices()[: int(np.prod(list(mesh.values())))]
    return task, build(task, config, make_mesh(MeshConfig(**{"data": 1} | mesh), devices))


def trained(mesh: dict, begin, *flags: str):
    """(state at the end, text of the program); begin: None, or the state to begin with."""
    task, compiled = made(mesh, *flags)
    batches = [text_batch(step) for step in range(STEPS)]
    if "--task=diffusion" in flags:
        source = task.data.loader.open("train")
        batches = [
            task.data.loader.gather(source, list(range(8 * i, 8 * i + 8))) for i in range(STEPS)
        ]
    with mesh_context(compiled.mesh):
        if begin is None:
            begin = jax.device_get(compiled.init(jax.random.key(0)).replace(rng=None))
        # Copies: the step is given its state to write over.
        begun = jax.tree.map(np.array, begin).replace(rng=jax.random.key(1))
        state = jax.device_put(begun, jax.tree.map(lambda x: x.sharding, compiled.shapes))
        batches = [jax.device_put(batch, compiled.batch_shardings) for batch in batches]
        step = compiled.step.lower(state, batches[0]).compile()
        for batch in batches:
            state, _ = step(state, batch)
    return begin, state, step.as_text()


def gathered(program: str) -> list[tuple[list[int], str]]:
    """(sizes, name) of every array that an all-gather of the program makes."""
    found = []
    for line in program.splitlines():
        made = re.search(r"= \(?(\w+\[[\d,]*\].*?) all-gather(-start)?\(", line)
        if made:
            name = re.search(r'op_name="([^"]*)"', line)
            for sizes in re.findall(r"\w+\[([\d,]*)\]", made[1]):
                found.append(([int(n) for n in sizes.split(",") if n], name[1] if name else ""))
    return found


def facts(program: str) -> dict:
    """What the program of a mesh with fsdp, tensor and sequence gathers."""
    arrays = gathered(program)
    heads = [name for sizes, name in arrays if sorted(sizes) == [32, 128] and "_gather" in name]
    return {
        # Of the tokens themselves, integers [rows, length], the whole length may be gathered.
        "whole_lengths": [sizes for sizes, _ in arrays if LENGTH in sizes and len(sizes) > 2],
        "heads": [name for name in heads if "embed" not in name],
        "sent": program.count(" collective-permute("),
    }


def pipelined(stages: int, microbatches: int, repeats: int) -> float:
    """Difference of a pipeline and its layers one after the other, the gradient too."""
    mesh = make_mesh(MeshConfig(data=8 // stages, stage=stages), jax.devices())
    rng = np.random.default_rng(0)
    sizes = (8, 4, 4), (32, 4), (32, 4)
    params, x, shift = (rng.normal(scale=0.3, size=size).astype(np.float32) for size in sizes)

    def layers(params, x, shift, key=None):
        del key
        return jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w) * shift, None), x, params)[0]

    config = ParallelConfig(microbatches=microbatches, repeats=repeats)
    apply = lambda params, x, shift: pipeline(layers, params, x, shift, config)
    results = []
    for function in (layers, apply):
        both = lambda *a, f=function: (lambda out: (jnp.sum(jnp.sin(out)), out))(f(*a))
        gradient = jax.value_and_grad(both, (0, 1, 2), has_aux=True)
        with mesh_context(mesh):
            results.append(jax.jit(gradient)(params, x, shift))
    return difference(*results)


def hybrid_pipeline() -> float:
    """Difference of a pipeline over the periods of a pattern of mixers and the plain stack."""
    config = TransformerConfig(
        num_layers=4, embed_dim=16, num_heads=2, pattern=f"{NAME},attention", remat="full"
    )
    model = Transformer(config, 11, parallel=ParallelConfig(repeats=1, microbatches=2))
    batch = text_batch(0)
    tokens = batch["tokens"] % 11
    apply = lambda p: model.apply({"params": p}, tokens, batch["positions"], batch["segment_ids"])
    both = lambda p: (lambda out: (jnp.mean(jnp.sin(out)), out))(apply(p)[0])
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    results = []
    for sizes in ({}, dict(data=4, stage=2)):
        devices = jax.devices() if sizes else jax.devices()[:1]
        with mesh_context(make_mesh(MeshConfig(**{"data": 1} | sizes), devices)):
            results.append(jax.jit(jax.value_and_grad(both, has_aux=True))(params))
    return difference(*results)


def refused_experts() -> str:
    """What is said of a mixture of experts over the stages of a pipeline."""
    config = TransformerConfig(num_layers=2, embed_dim=16, num_heads=2)
    model = Transformer(config, 11, moe=MoeConfig(num_experts=2))
    tokens = jnp.zeros((8, 4), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    try:
        with mesh_context(make_mesh(MeshConfig(data=4, stage=2), jax.devices())):
            jax.eval_shape(model.apply, variables, tokens)
    except ConfigError as error:
        return str(error)
    return "not refused"


def refusal(mesh: dict, *flags: str) -> str:
    try:
        made(mesh, *flags)
    except ConfigError as error:
        return str(error)
    return "not refused"


def main():
    assert jax.device_count() == 8, jax.devices()
    report = {"differences": {}}
    for flags, meshes in ((LANGUAGE, LANGUAGE_MESHES), (IMAGES, IMAGE_MESHES)):
        begin, one, _ = trained({}, None, *flags)
        for name, (mesh, *more) in meshes.items():
            _, state, program = trained(mesh, begin, *flags, *more)
            report["differences"][name] = difference(one, state)
            if name == "ring, mixed":
                report["mixed"] = facts(program)
    report["pipelines"] = [pipelined(*sizes) for sizes in ((2, 1, 1), (4, 4, 2), (2, 8, 4))]
    report["hybrid"] = hybrid_pipeline()
    report["refused"] = {
        name: refusal(mesh, *(() if name == "unused" else LANGUAGE), *more)
        for name, (mesh, *more) in REFUSED.items()
    }
    report["refused"]["experts"] = refused_experts()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
