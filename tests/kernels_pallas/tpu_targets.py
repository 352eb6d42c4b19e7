"""Compiles the TPU kernels for chips that are not here; a process of its own (see `main`).

`python -m tests.kernels_pallas.tpu_targets --record` writes the budgets of this jax anew.
"""

import json
import os
import pathlib
import re
import shutil
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import Causal, Window, bundles, targets
from kernels_pallas.spec import Operands, Spec
from kernels_pallas.tpu import flash
from kernels_pallas.tpu.visits import Blocks

from .target_process import record, report_of

CAUSAL = Causal()
BUDGETS = pathlib.Path(__file__).parent / "tpu_bundles.json"
BLOCKS = flash.Settings(Blocks(256, 256, 256), Blocks(256, 256, 256))  # small: quick to compile

# kind: (targets, dtype, head_dim, features)
KINDS = {
    "causal, grouped": (("v4", "v5e", "v5p", "v6e", "7x"), "bfloat16", 128, {}),
    "window, segments, soft cap": (
        ("v5e",),
        "bfloat16",
        64,
        dict(mask=Window(600), segments=True, soft_cap=30.0),
    ),
    "alibi, sinks": (("v6e",), "float32", 128, dict(alibi=True, sinks=True)),
    "array offset": (("v5p",), "bfloat16", 256, dict(offset=True)),
}
CASES = {
    f"{kind}, {target}, {kernel}": (kind, target, kernel)
    for kind, (targets_, *_) in KINDS.items()
    for target in targets_
    for kernel in ("forward", "backward")
}
LENGTH, HEADS, KV_HEADS = 1024, 4, 2
LONG_LENGTH, LONG_HEADS = 32768, 16


def call(dtype, head_dim, mask=CAUSAL, segments=False, soft_cap=None, alibi=False, sinks=False,
         offset=False, settings=BLOCKS):  # fmt: skip
    """{kernel: (function, arguments as shapes)} of one kind. Heads-major, without the call's
    transpositions, which would be most of what is compiled."""
    shape = lambda dims, dtype=dtype: jax.ShapeDtypeStruct(dims, jnp.dtype(dtype))
    q, kv = (shape((1, heads, LENGTH, head_dim)) for heads in (HEADS, KV_HEADS))
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
    row = shape((1, HEADS, LENGTH), "float32")
    return {
        "forward": (lambda x: flash.heads_major_attention(x, spec, settings), (x,)),
        "backward": (
            lambda x, *rows: flash.heads_major_gradients(x, spec, settings, *rows),
            (x, q, row, row),
        ),
    }


def compile_cases(names: list[str], folder: str) -> dict:
    """{case: bundles of its bodies and so on}; `folder` gets the listings."""
    found = {}
    for name in names:
        kind, target, kernel = CASES[name]
        _, dtype, head_dim, features = KINDS[kind]
        function, arguments = call(dtype, head_dim, **features)[kernel]
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        targets.compile_for(target, function, *arguments)
        read = bundles.read(folder, f"flash_attention_{kernel}")
        found[name] = dict(bodies=read.bodies, always=read.always, spills=read.spills)
        print(name, found[name], flush=True)
    return found


def compile_long() -> dict:
    """The largest buffer (elements) and the temporary bytes of a long call, both passes."""
    x = jax.ShapeDtypeStruct((1, LONG_LENGTH, LONG_HEADS, 128), jnp.bfloat16)
    spec = Spec(Causal(), 1.0)

    def loss(q, k, v):
        out, _ = flash.attention(Operands(q, k, v), spec, BLOCKS)
        return out.astype(jnp.float32).sum()

    program = targets.compile_for("v5e", jax.value_and_grad(loss, (0, 1, 2)), x, x, x)
    shapes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", program.as_text())
    sizes = [int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes]
    assert "flash_attention_forward" in program.as_text()
    assert "flash_attention_backward" in program.as_text()
    return dict(largest=max(sizes), temporary=program.memory_analysis().temp_size_in_bytes)


def main() -> None:
    names = sys.argv[1:]
    if names == ["--record"]:
        record(BUDGETS, report_of("tpu_targets", *CASES))
        return
    with tempfile.TemporaryDirectory() as folder:
        targets.prepare_environment(bundles.FLAGS.format(folder=folder))
        found = compile_long() if names == ["long"] else compile_cases(names, folder)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
