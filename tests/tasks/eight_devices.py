"""Trains image tasks on 1 and on 8 simulated devices; prints the largest differences as JSON."""

import json
import sys

import jax

sys.path.insert(0, ".")

from genai_jax.components import parse_run
from genai_jax.tasks import TASKS
from genai_jax.training.loop import build
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
TASK_FLAGS = {
    "dit_text": (
        *DIT, "--task=diffusion", "--dit.text_layers=1", "--data.captions",
        "--data.caption_length=16", "--diffusion.condition=text",
    ),
    "unet_class": (
        "--task=diffusion", "--unet.channels=8", "--unet.channel_multipliers=1,2",
        "--unet.attention_resolutions=4", "--unet.head_dim=8", "--unet.blocks_per_level=1",
        "--diffusion.condition=class",
    ),
    "shortcut": (
        *DIT, "--task=few_step", "--few_step.method=shortcut", "--few_step.bootstrap=0.5",
        "--diffusion.schedule=flow", "--diffusion.parameterization=velocity",
    ),
    "classifier": (
        "--task=image_classifier", "--classifier.channels=8", "--classifier.num_stages=2",
        "--classifier.feature_dim=8", "--augment.shift=1",
    ),
}  # fmt: skip
MESH = MeshConfig(data=2, fsdp=2, tensor=2)
STEPS = 2


def trained(flags, mesh_config: MeshConfig, devices):
    config = parse_run((*COMMON, *flags))
    task = TASKS[config.run.task](config)
    compiled = build(task, config, make_mesh(mesh_config, devices))
    source = task.loader.open("train")
    with mesh_context(compiled.mesh):
        state = compiled.init(jax.random.key(0))
        for step in range(STEPS):
            rows = range(8 * step, 8 * step + 8)
            batch = jax.device_put(task.loader.gather(source, list(rows)), compiled.batch_shardings)
            state, _ = compiled.step(state, batch)
    return state


def main():
    assert jax.device_count() == 8, jax.devices()
    report = {}
    for name, flags in TASK_FLAGS.items():
        one = trained(flags, MeshConfig(), jax.devices()[:1])
        eight = trained(flags, MESH, jax.devices())
        split = [x for x in jax.tree.leaves(eight.params) if not x.sharding.is_fully_replicated]
        report[name] = {"difference": difference(one, eight), "sharded": len(split)}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
