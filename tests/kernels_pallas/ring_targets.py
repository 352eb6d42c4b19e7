"""Compiles ring attention for four TPUs; prints what it sends and computes, in order."""

import json
import re
import sys

from kernels_pallas import targets

targets.prepare_environment()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from kernels_pallas import ring_attention  # noqa: E402

KINDS = "collective-permute-start|collective-permute-done|conditional|custom-call"


def main(order: str):
    slice_ = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    mesh = Mesh(np.array(slice_.devices), ("ring",))
    along = PartitionSpec(None, "ring")
    x = jax.ShapeDtypeStruct((1, 2048, 4, 128), jnp.bfloat16, sharding=NamedSharding(mesh, along))
    run = jax.shard_map(
        lambda q, k, v: ring_attention(q, k, v, axis_name="ring", order=order),
        mesh=mesh, in_specs=along, out_specs=along, check_vma=False,
    )  # fmt: skip
    with jax.set_mesh(mesh):
        program = jax.jit(run).trace(x, x, x).lower().compile().as_text()
    events = []
    for line in program[program.index("ENTRY") :].splitlines():
        found = re.search(rf"%?([\w.\-]+) = .*?({KINDS})\(%?([\w.\-]+)?", line)
        if found and (found[2] != "custom-call" or "flash_attention" in found[1]):
            events.append(found.groups())
    print(json.dumps(events))


if __name__ == "__main__":
    main(sys.argv[1])
