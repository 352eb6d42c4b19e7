"""Trains the named tasks on 1 and on 8 simulated devices; prints differences as JSON."""

import json
import sys

import jax
import numpy as np

sys.path.insert(0, ".")

from genai_jax.components import make_task, parse_run
from genai_jax.training.execution import build
from genai_jax.training.sharding import MeshConfig, make_mesh, mesh_context
from tests.training.eight_devices import difference

COMMON = (
    "--data.batch_size=8",
    "--ema.decay=0.9",
    "--optimizer.learning_rate=1e-2",
    "--optimizer.warmup_steps=0",
    "--optimizer.epsilon=1e-3",  # Adam's sign-like first steps would magnify rounding
)
DIT = (
    "--diffusion.network=dit",
    "--dit.num_layers=2",
    "--dit.embed_dim=16",
    "--dit.num_heads=2",
    "--dit.patch_size=4",
)
PAIRS = (
    "--task=sequence_to_sequence", "--sequence_to_sequence.objective=pairs",
    "--data.dataset=number_names:2", "--data.sequence_length=24", "--transformer.num_layers=2",
    "--transformer.embed_dim=16", "--transformer.num_heads=2",
)  # fmt: skip
TRANSFORMER = (*PAIRS, "--sequence_to_sequence.encoder_layers=1")
TASK_FLAGS = {
    "dit_text": (
        *DIT, "--task=diffusion", "--dit.text_layers=1", "--data.captions",
        "--data.caption_length=16", "--diffusion.condition=text",
    ),
    "encoder_decoder": (
        *TRANSFORMER, "--transformer.positions=relative_buckets", "--transformer.qk_norm",
    ),
    "latent_reader": (
        "--task=sequence_to_sequence", "--sequence_to_sequence.vocab_size=358",
        "--sequence_to_sequence.latents=4",
        "--sequence_to_sequence.encoder_layers=1", "--data.sequence_length=32",
        "--transformer.num_layers=1", "--transformer.embed_dim=16", "--transformer.num_heads=2",
    ),
    "additive_attention": (
        *PAIRS[:-3], "--sequence_to_sequence.network=recurrent", "--recurrent.embed_dim=8",
        "--recurrent.hidden_dim=8", "--recurrent.attention_dim=8",
    ),
    "unet_class": (
        "--task=diffusion", "--unet.channels=8", "--unet.channel_multipliers=1,2",
        "--unet.attention_resolutions=4", "--unet.head_dim=8", "--unet.blocks_per_level=1",
        "--diffusion.condition=class",
    ),
    "shortcut": (
        *DIT, "--task=few_step", "--few_step.method=shortcut", "--few_step.bootstrap=0.5",
        "--diffusion.schedule=flow", "--diffusion.parameterization=velocity",
        "--sampler.solver=euler", "--sampler.steps=2",
    ),
    "gan": (
        "--task=gan", "--gan.condition=class", "--gan.r1=1", "--gan.r1_every=2",
        "--gan.path_length=1", "--generator.network=style", "--generator.style_dim=8",
        "--generator.latent_dim=8", "--generator.mapping_layers=1", "--generator.channels=8",
        "--critic.network=residual", "--critic.channels=8", "--critic.spectral_norm",
        "--critic.minibatch_std",
    ),
    "ladder": (
        "--task=vae", "--vae.network=ladder", "--ladder_vae.stages=4x1,8x1",
        "--ladder_vae.channels=16", "--vae.condition=class",
    ),
    "blocks_of_text": (
        "--task=discrete_diffusion", "--discrete_diffusion.block_size=4",
        "--discrete_diffusion.vocab_size=258",
        "--transformer.num_layers=1", "--transformer.embed_dim=16", "--transformer.num_heads=2",
        "--data.sequence_length=32",
    ),
    "flow": (
        "--task=normalizing_flow", "--glow.steps_per_level=1", "--glow.levels=1",
        "--glow.hidden_channels=8",
    ),
    "rbm": (
        "--task=rbm", "--rbm.num_hidden=8", "--rbm.chains=8", "--rbm.sweeps=2",
    ),
    "classifier": (
        "--task=image_classifier", "--classifier.channels=8", "--classifier.num_stages=2",
        "--classifier.feature_dim=8", "--augment.shift=1",
    ),
    "skip_gram": ("--task=word_vectors", "--word_vectors.dim=8", "--data.min_count=50"),
    "glove": (
        "--task=word_vectors", "--word_vectors.objective=glove", "--word_vectors.dim=8",
        "--data.min_count=50",
    ),
    "neural_lm": (
        "--task=neural_lm", "--neural_lm.context=3", "--neural_lm.embed_dim=4",
        "--neural_lm.hidden_dim=8", "--neural_lm.direct", "--data.sequence_length=32",
    ),
}  # fmt: skip
MESH = MeshConfig(data=2, fsdp=2, tensor=2)
STEPS = 2


def trained(flags, mesh_config: MeshConfig, devices, begin=None):
    """(state at the start, state after some steps); begin: None, or the state to start with."""
    config = parse_run((*COMMON, *flags))
    task = make_task(config)
    compiled = build(task, config, make_mesh(mesh_config, devices))
    batches = task.data.train()
    with mesh_context(compiled.mesh):
        if begin is None:
            begin = jax.device_get(compiled.init(jax.random.key(0)).replace(rng=None))
        # Copies: the step is given its state to write over.
        state = jax.tree.map(np.array, begin).replace(rng=jax.random.key(1))
        state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, compiled.shapes))
        for _ in range(STEPS):
            batch = jax.device_put(dict(next(batches)), compiled.batch_shardings)
            state, _ = compiled.step(state, batch)
    batches.close()
    return begin, state


def main():
    assert jax.device_count() == 8, jax.devices()
    report = {}
    for name in sys.argv[1:]:
        flags = TASK_FLAGS[name]
        begin, eight = trained(flags, MESH, jax.devices())
        _, one = trained(flags, MeshConfig(), jax.devices()[:1], begin)
        split = [x for x in jax.tree.leaves(eight.params) if not x.sharding.is_fully_replicated]
        report[name] = {"difference": difference(one, eight), "sharded": len(split)}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
