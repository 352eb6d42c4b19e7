"""Trains in one process of eight devices, then restores what it saved on other meshes.

Usage: one_process_of_eight.py PORT --flag=value ...; prints a JSON object as the last line.

Its collectives are those of runs of several processes (gloo over loopback), which sum in another
order than the ones inside a single process.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from genai_jax import train
from genai_jax.components import make_task, parse_run
from genai_jax.tasks.protocol import ArraySpec
from genai_jax.training.batches import BatchPlacement
from genai_jax.training.checkpoint import CheckpointConfig, Checkpointer
from genai_jax.training.execution import state_shapes
from genai_jax.training.sharding import MeshConfig, batch_shardings, make_mesh

MESHES = {
    "data 8": (MeshConfig(), 8),
    "fsdp 2 x tensor 4": (MeshConfig(data=1, fsdp=2, tensor=4), 8),
    "one device": (MeshConfig(), 1),
}


def host_bits(state) -> list[bytes]:
    """The bytes of every leaf, keys by their data."""
    plain = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return [np.asarray(plain(x)).tobytes() for x in jax.tree.leaves(state)]


def carried_from_mesh_to_mesh(config, folder: str) -> list[bool]:
    """Restores the run's state on mesh after mesh, saving it anew from each; whether it stays."""
    task = make_task(config)
    source, step, found = f"{config.run.workdir}/checkpoints", None, []
    for i, (mesh, devices) in enumerate(MESHES.values()):
        shapes = state_shapes(task, config, make_mesh(mesh, jax.devices()[:devices]))
        checkpointer = Checkpointer(source, CheckpointConfig(), read_only=True)
        step, state, data, clock = checkpointer.restore(shapes, step)
        checkpointer.close()
        found.append(host_bits(state))
        assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s.sharding, state, shapes))
        source = f"{folder}/{i}"
        checkpointer = Checkpointer(source, CheckpointConfig())
        checkpointer.save(step, state, data, clock)
        checkpointer.close()
    return [bits == found[0] for bits in found]


def placed_as_they_are() -> bool:
    """Whether a batch whose rows and length are split comes back whole from the devices."""
    mesh = make_mesh(MeshConfig(data=2, sequence=2, tensor=2))
    batch = {"x": np.arange(8 * 6).reshape(8, 6), "y": np.arange(8)}
    axes = {"x": ("batch", "length"), "y": ("batch",)}
    spec = {name: ArraySpec(x.shape, x.dtype, axes[name]) for name, x in batch.items()}
    placement = BatchPlacement(spec, batch_shardings(spec, mesh))
    arrays = placement.to_devices(batch)
    split = arrays["x"].addressable_shards[0].data.shape == (4, 3)
    return split and all(np.array_equal(arrays[name], batch[name]) for name in batch)


def main():
    port, *flags = sys.argv[1:]
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(f"127.0.0.1:{port}", 1, 0, None, "deactivate")
    assert train.main(flags) == 0
    config = parse_run(flags)
    report = {
        "same": carried_from_mesh_to_mesh(config, f"{config.run.workdir}/carried"),
        "placed": placed_as_they_are(),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
