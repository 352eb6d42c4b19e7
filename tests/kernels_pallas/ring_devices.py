"""Compares ring attention on 8 simulated devices with one device; prints differences as JSON."""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

sys.path.insert(0, ".")

from kernels_pallas import (
    Alibi,
    Chunked,
    Prefix,
    Window,
    attention,
    ring_attention,
    unzigzag,
    zigzag,
)
from tests.kernels_pallas.cases import FAST

DEVICES, LENGTH = 8, 64
# name: (the orders to run, arguments of `make`)
CASES = {
    "causal, grouped": (("contiguous", "zigzag"), dict(kv_heads=2)),
    "window, segments, soft cap, multi-query": (
        ("contiguous",),
        dict(mask=Window(11, 2), segments=True, logits_soft_cap=1.5, kv_heads=1),
    ),
    "prefix, chunked, alibi, sinks, segments": (
        ("zigzag",),
        dict(mask=Prefix(20) & Chunked(24), alibi=True, sinks=True, segments=True),
    ),
}


def make(kv_heads=4, segments=False, sinks=False, alibi=False, **static):
    """(arrays to differentiate, segment ids or None, static arguments)."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)
    arrays = dict(
        q=normal(2, LENGTH, 4, 8),
        k=normal(2, LENGTH, kv_heads, 8),
        v=normal(2, LENGTH, kv_heads, 8),
    )
    if sinks:
        arrays["sinks"] = normal(4)
    if alibi:
        arrays["slopes"] = np.linspace(0.1, 0.4, 4, dtype=np.float32)
    # No query of the second row sees the third document: its keys have no gradient.
    ids = np.stack([np.arange(LENGTH) // 23, np.minimum(np.arange(LENGTH) // 30, 1)])
    return arrays, ids.astype(np.int32) if segments else None, static


def loss(call, arrays, ids):
    """A loss with uneven weights on out and lse, and (out, lse)."""
    more = {"bias": Alibi(arrays["slopes"])} if "slopes" in arrays else {}
    if "sinks" in arrays:
        more["sinks"] = arrays["sinks"]
    out, lse = call(arrays["q"], arrays["k"], arrays["v"], segment_ids=ids, return_lse=True, **more)
    weigh = jnp.cos(jnp.arange(out.size)).reshape(out.shape)
    return jnp.sum(weigh * out) + jnp.sum(weigh[..., 0] * jnp.swapaxes(lse, 1, 2)), (out, lse)


def on_the_ring(order: str, static: dict):
    """`ring_attention` over the mesh in use, with the signature of `attention`."""
    along, whole = PartitionSpec(None, "ring"), PartitionSpec()

    def call(q, k, v, *, segment_ids=None, bias=None, sinks=None, return_lse):
        given = dict(segment_ids=segment_ids, bias=bias, sinks=sinks)
        given = {name: value for name, value in given.items() if value is not None}

        def local(q, k, v, given):
            return ring_attention(
                q, k, v, axis_name="ring", order=order, return_lse=return_lse, **given, **static
            )

        specs = {name: along if name == "segment_ids" else whole for name in given}
        run = jax.shard_map(
            local,
            in_specs=(along, along, along, specs),
            out_specs=(along, PartitionSpec(None, None, "ring")),
            check_vma=False,
        )
        if order == "contiguous":
            return run(q, k, v, given)
        turn = functools.partial(zigzag, size=DEVICES)
        if "segment_ids" in given:
            given["segment_ids"] = turn(given["segment_ids"])
        out, lse = run(turn(q), turn(k), turn(v), given)
        return unzigzag(out, DEVICES), unzigzag(lse, DEVICES, axis=2)

    return call


def difference(got, want) -> float:
    """The largest difference, relative to the largest magnitude in `want`."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        worst = max(worst, float(np.abs(a - b).max() / max(1.0, np.abs(b).max())))
    return worst


def main():
    mesh = jax.make_mesh((DEVICES,), ("ring",), axis_types=(AxisType.Auto,))
    report = {}
    with jax.set_mesh(mesh):
        for name, (orders, features) in CASES.items():
            arrays, ids, static = make(**features)

            def run(call, arrays=arrays, ids=ids):
                gradient = jax.grad(functools.partial(loss, call), has_aux=True)
                return jax.jit(gradient, compiler_options=FAST)(arrays, ids)

            want = run(functools.partial(attention, backend="xla", **static))
            for order in orders:
                got = run(on_the_ring(order, static))
                sides = zip(("gradients", "values"), got, want, strict=True)
                report[f"{name}: {order}"] = {side: difference(a, b) for side, a, b in sides}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
