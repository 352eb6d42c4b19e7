"""Compiles the Hopper kernels for an H200 that is not here; a process of its own (see `main`)."""

import json
import os
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import Causal, Full, Prefix, Window, targets
from kernels_pallas.gpu import flash
from kernels_pallas.spec import Operands, Spec

LENGTH, HEADS, KV_HEADS = 1000, 4, 2
LONG_LENGTH, LONG_HEADS = 32768, 16
CAUSAL = Causal()

# case: (dtype, head_dim, features)
CASES = {
    "causal": ("bfloat16", 128, {}),
    "head dim 96": ("bfloat16", 96, dict(mask=Full())),
    "head dim 64, window, segments": ("float16", 64, dict(mask=Window(300, 20), segments=True)),
    "everything": (
        "bfloat16",
        128,
        dict(
            mask=Window(300, 2) & Prefix(40),
            segments=True,
            alibi=True,
            sinks=True,
            offset=True,
            soft_cap=30.0,
        ),
    ),
    "head dim 192": ("bfloat16", 192, {}),
    "head dim 256": ("bfloat16", 256, {}),
}


def call(dtype, head_dim, mask=CAUSAL, segments=False, soft_cap=None, alibi=False, sinks=False,
         offset=False):  # fmt: skip
    """(function, arguments as shapes) of the forward and backward pass of one case."""
    shape = lambda dims, dtype=dtype: jax.ShapeDtypeStruct(dims, jnp.dtype(dtype))
    q, kv = (shape((1, LENGTH, heads, head_dim)) for heads in (HEADS, KV_HEADS))
    ids = shape((1, LENGTH), "int32") if segments else None
    x = Operands(
        q=q,
        k=kv,
        v=kv,
        slopes=shape((HEADS,), "float32") if alibi else None,
        sinks=shape((HEADS,), "float32") if sinks else None,
        q_segment_ids=ids,
        kv_segment_ids=ids,
        q_offset=shape((1,), "int32") if offset else None,
    )
    spec = Spec(mask, head_dim**-0.5, soft_cap, None if offset else 0)
    return lambda x: loss_and_gradients(x, spec), (x,)


def loss_and_gradients(x: Operands, spec: Spec):
    def loss(floats):
        out, lse = flash.attention(x._replace(**floats), spec)
        return out.astype(jnp.float32).sum() + lse.sum()

    given = {n: getattr(x, n) for n in ("q", "k", "v", "slopes", "sinks")}
    return jax.value_and_grad(loss)({n: a for n, a in given.items() if a is not None})


def compile_cases(names: list[str], folder: pathlib.Path) -> dict:
    """{"case, kernel": bytes of spills and whether wgmmas wait for each other}."""
    found = {}
    for case in names:
        dtype, head_dim, features = CASES[case]
        function, arguments = call(dtype, head_dim, **features)
        targets.compile_for("h200", function, *arguments)
        for report in folder.glob("*.ptxas"):
            kernel = re.sub(r"_+(\d+)?$", "", report.stem)
            found[f"{case}, {kernel}"] = _read(report.read_text())
        for file in folder.iterdir():
            file.unlink()
    return found


def _read(report: str) -> dict:
    """Of what ptxas says of one kernel."""
    return dict(
        spills=sum(int(n) for n in re.findall(r"stack frame, (\d+) bytes spill stores", report)),
        registers=int(re.search(r"Used (\d+) registers", report).group(1)),
        serialized="wgmma.mma_async instructions are serialized" in report,
    )


def compile_long() -> dict:
    """The largest buffer (elements), the temporary bytes and the number of transposed copies of a
    long call, both passes."""
    x = jax.ShapeDtypeStruct((1, LONG_LENGTH, LONG_HEADS, 128), jnp.bfloat16)
    run = lambda q, k, v: loss_and_gradients(Operands(q, k, v), Spec(Causal(), 1.0))
    program = targets.compile_for("h200", run, x, x, x)
    shapes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", program.as_text())
    sizes = [int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes]
    return dict(
        largest=max(sizes),
        temporary=program.memory_analysis().temp_size_in_bytes,
        transposes=len(re.findall(r"\} transpose\(", program.as_text())),
    )


def main() -> None:
    targets.prepare_environment()
    jax.config.update("jax_enable_compilation_cache", False)  # a kept program dumps no report
    folder = pathlib.Path(os.environ["MOSAIC_GPU_DUMP_TO"])
    names = sys.argv[1:]
    print(json.dumps(compile_long() if names == ["long"] else compile_cases(names, folder)))


if __name__ == "__main__":
    main()
