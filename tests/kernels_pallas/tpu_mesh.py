"""Compares the TPU kernels on 8 simulated devices with one; prints the differences as JSON."""

import json

import jax

jax.config.update("jax_num_cpu_devices", 8)

import numpy as np  # noqa: E402
from jax.sharding import AxisType, NamedSharding, PartitionSpec  # noqa: E402

from kernels_pallas import Window  # noqa: E402
from kernels_pallas.partition import mesh_axes  # noqa: E402

from .cases import make  # noqa: E402
from .tpu_calls import kernel, results, split  # noqa: E402

FEATURES = dict(
    batch=4,
    q_length=40,
    kv_length=150,
    kv_heads=2,
    mask=Window(60, 3),
    alibi=True,
    sinks=True,
    segments=True,
    offsets=True,
)
# name: (mesh, arguments of `mesh_axes` or None)
MESHES = {
    "data and tensor": (dict(data=2, fsdp=2, tensor=2), None),
    "axes of other names": (dict(rows=4, columns=2), dict(batch=("rows",), heads=("columns",))),
    "a tensor axis that key heads do not divide": (dict(data=2, tensor=4), None),
}


def difference(mesh, axes, x, spec, want) -> float:
    """The largest difference of outputs and gradients, relative to the magnitude of each."""
    place = NamedSharding(mesh, PartitionSpec(mesh.axis_names[0]))
    x = x._replace(**{n: jax.device_put(getattr(x, n), place) for n in ("q", "k", "v")})
    with jax.set_mesh(mesh):
        if axes is None:
            got = results(kernel(), x, spec)
        else:
            with mesh_axes(**axes):
                got = results(kernel(), x, spec)
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    finite = lambda a: np.where(np.isfinite(a), a, 0)
    return max(
        float(np.abs(finite(a) - finite(b)).max() / max(1, np.abs(finite(b)).max()))
        for a, b in pairs
    )


def main() -> None:
    x, spec = split(*make(**FEATURES))
    want = results(kernel(), x, spec)
    differences = {}
    for name, (sizes, axes) in MESHES.items():
        types = (AxisType.Auto,) * len(sizes)
        mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types)
        differences[name] = difference(mesh, axes, x, spec, want)
    print(json.dumps(differences))


if __name__ == "__main__":
    main()
