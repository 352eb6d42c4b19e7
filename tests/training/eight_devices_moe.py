"""Trains a mixture of experts on 1 and on 8 simulated devices; prints the differences as JSON."""

import json
import re
import sys

import jax

sys.path.insert(0, ".")

from genai_jax.components import parse_run
from genai_jax.config import ConfigError
from genai_jax.tasks.language.causal import LanguageModel
from genai_jax.training.execution import build
from genai_jax.training.sharding import MeshConfig, make_mesh, mesh_context
from tests.training.eight_devices import batch_of, difference

FLAGS = (
    "--data.batch_size=8",
    "--data.sequence_length=16",
    "--transformer.num_layers=2",
    "--transformer.embed_dim=16",
    "--transformer.num_heads=2",
    "--moe.num_experts=8",
    "--moe.expert_dim=8",
    "--moe.shared_experts=1",
    "--moe.load_balance=0.1",
    "--moe.router_z_loss=0.1",
    "--language_model.loss_chunk=0",
    "--optimizer.learning_rate=1e-2",
    "--optimizer.warmup_steps=0",
    "--optimizer.epsilon=1e-3",  # Adam's sign-like first steps would magnify rounding
)
ROUTING = {"dropless": (), "capacity": ("--moe.capacity_factor=1", "--moe.group_size=8")}
# Name: (routing, mesh).
CASES = {
    "expert": ("capacity", MeshConfig(data=1, expert=8)),
    "data_expert": ("dropless", MeshConfig(data=2, expert=4)),
    "mixed": ("dropless", MeshConfig(data=1, expert=2, fsdp=2, tensor=2)),
}
STEPS = 3
COLLECTIVES = r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("


def batch(step: int) -> dict:
    """One with padding: the last tokens of some rows."""
    found = batch_of(step)
    padding = found["positions"] + 8 * (found["segment_ids"] - 1) >= 12
    padding[:5] = False
    return found | {
        "segment_ids": found["segment_ids"] * ~padding,
        "loss_mask": found["loss_mask"] * ~padding,
    }


def trained(routing: str, mesh_config: MeshConfig, devices, state):
    """((state after some steps, metrics of the last), kinds of collectives in a step).

    state: to begin with; None makes a fresh one and takes no step.
    """
    config = parse_run([*FLAGS, *ROUTING[routing]])
    mesh = make_mesh(mesh_config, devices)
    compiled = build(LanguageModel(config), config, mesh)
    with mesh_context(mesh):
        if state is None:
            return compiled.init(jax.random.key(0))
        state = state.replace(
            rng=jax.random.key(1)
        )  # not given away to the step, as a key would be
        state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, compiled.shapes))
        batches = [jax.device_put(batch(i), compiled.batch_shardings) for i in range(STEPS)]
        step = compiled.step.lower(state, batches[0]).compile()
        for placed in batches:
            state, report = step(state, placed)
    return (state, report.metrics), sorted(set(re.findall(COLLECTIVES, step.as_text())))


def refusal() -> str:
    """What is said of six experts over four devices."""
    config = parse_run([*FLAGS, "--moe.num_experts=6"])
    try:
        build(LanguageModel(config), config, make_mesh(MeshConfig(data=2, expert=4)))
    except ConfigError as error:
        return str(error)
    return ""


def main():
    assert jax.device_count() == 8, jax.devices()
    first = jax.devices()[:1]
    begin = jax.device_get(trained("dropless", MeshConfig(), first, None))
    one = {name: trained(name, MeshConfig(), first, begin) for name in ROUTING}
    report = {}
    for name, (routing, mesh) in CASES.items():
        (state, metrics), sent = trained(routing, mesh, jax.devices(), begin)
        experts = state.params["model"]["layers"]["mlp"]["experts"]["up"]
        report[name] = {
            "difference": difference(one[routing][0], (state, metrics)),
            "sent": sent,
            "experts": experts.addressable_shards[0].data.shape[1],
            "dropped": float(metrics["moe/dropped"]),
        }
    print(json.dumps(report | {"refused": refusal()}))


if __name__ == "__main__":
    main()
