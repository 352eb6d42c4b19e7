"""Compiles one small sharded step with each group of options; a process of its own (see `main`)."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from genai_jax.training.compiler import GROUPS
from kernels_pallas import targets


def step(kernel, x):
    """A gradient step whose kernel is gathered and whose gradient is scattered."""
    gradient = jax.grad(lambda k: jnp.mean(jnp.square(jnp.tanh(x @ k) @ k)))(kernel)
    return kernel - 0.1 * gradient


def slice_of(chip: str) -> Mesh:
    """Four devices of a TPU, one of a GPU."""
    if targets.TARGETS[chip].platform == "gpu":
        return targets.mesh(chip)
    target = targets.TARGETS[chip]
    described = topologies.get_topology_desc(
        platform="tpu", topology_name=target.topology, **target.options
    )
    return Mesh(np.array(described.devices), ("device",))


def attempt(mesh: Mesh, options) -> str | None:
    """The compiler's objection, if it has one."""
    split = NamedSharding(mesh, PartitionSpec("device"))
    shape = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16, sharding=split)
    try:
        with jax.set_mesh(mesh):
            jitted = jax.jit(step, out_shardings=split, compiler_options=options)
            jitted.trace(shape, shape).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        return str(error)
    return None


def refusals(mesh: Mesh, groups: dict) -> dict[str, str]:
    """{group: objection}; groups that do not contradict each other are compiled together."""
    together, alone = {}, []
    for name, options in groups.items():
        if all(together.get(option, value) == value for option, value in options.items()):
            together |= options
        else:
            alone.append(name)
    if attempt(mesh, together):
        alone = list(groups)
    found = {name: attempt(mesh, groups[name]) for name in alone}
    return {name: objection for name, objection in found.items() if objection}


def main(chip: str):
    """Prints {"platform": of the devices, "tried": groups, "refused": {group: objection}}.

    They are those for the chip; one that is made up is tried apart.
    """
    targets.prepare_environment()
    mesh = slice_of(chip)
    kind = targets.TARGETS[chip].platform
    groups = {
        name: group.options
        for name, group in GROUPS.items()
        if group.platform == kind and chip in (group.chips or (chip,))
    }
    refused = refusals(mesh, groups) | refusals(mesh, {"made up": {"xla_made_up": True}})
    platform = mesh.devices.flat[0].platform
    print(json.dumps({"platform": platform, "tried": list(groups), "refused": refused}))


if __name__ == "__main__":
    main(*sys.argv[1:])
