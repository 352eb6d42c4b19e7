"""Compiles the decoding kernels for chips that are not here; a process of its own (see `main`).

`python -m tests.kernels_pallas.decode_targets --record` writes the budgets of this jax anew.
"""

import json
import os
import pathlib
import re
import sys
import tempfile

import jax
import jax.numpy as jnp

from kernels_pallas import Causal, Window, bundles, targets
from kernels_pallas.caches import ContiguousCache, Int8, PagedCache, RingCache
from kernels_pallas.decoding import decode

from .target_process import record, report_of

BUDGETS = pathlib.Path(__file__).parent / "decode_bundles.json"
BATCH, LENGTH, KV_HEADS, GROUPS, HEAD_DIM, PAGE = 4, 32768, 8, 8, 128, 128
WINDOW = 4096
TARGETS = ("v4", "v5e", "v5p", "v6e", "7x", "h200")

# kind of cache: what it is compiled as on v4, which has no int8, and elsewhere
KINDS = {
    "contiguous": ("bfloat16", "bfloat16"),
    "paged": ("bfloat16", "int8"),
    "ring": ("bfloat16", "bfloat16"),
}
CASES = [f"{kind}, {target}" for target in TARGETS for kind in KINDS]


def shapes(kind: str, dtype: str):
    """(q, cache, lengths) as shapes."""
    like = jax.ShapeDtypeStruct

    def store(*dims):
        values = like(dims, jnp.dtype(dtype))
        return Int8(values, like(dims[:-1], jnp.float32)) if dtype == "int8" else values

    if kind == "paged":
        k = store(BATCH * LENGTH // PAGE, KV_HEADS, PAGE, HEAD_DIM)
        cache = PagedCache(k, k, like((BATCH, LENGTH // PAGE), jnp.int32))
    elif kind == "ring":
        k = store(BATCH, KV_HEADS, WINDOW, HEAD_DIM)
        cache = RingCache(k, k)
    else:
        k = store(BATCH, KV_HEADS, LENGTH, HEAD_DIM)
        cache = ContiguousCache(k, k)
    q = like((BATCH, 1, KV_HEADS * GROUPS, HEAD_DIM), jnp.bfloat16)
    return q, cache, like((BATCH,), jnp.int32)


def compiled(target: str, kind: str, dtype: str):
    mask = Window(WINDOW - 1) if kind == "ring" else Causal()
    backend = "gpu" if target == "h200" else "tpu"
    run = lambda q, cache, lengths: decode(q, cache, lengths=lengths, mask=mask, backend=backend)
    return targets.compile_for(target, run, *shapes(kind, dtype))


def compile_for_tpu(kind: str, target: str, folder: pathlib.Path) -> dict:
    """Bundles, spills and temporary bytes."""
    program = compiled(target, kind, KINDS[kind][target != "v4"])
    got = bundles.read(folder, "decode_attention")
    return dict(
        always=got.always,
        bodies=got.bodies,
        spills=got.spills,
        temporary=program.memory_analysis().temp_size_in_bytes,
    )


def compile_for_gpu(kind: str, folder: pathlib.Path) -> dict:
    """Registers, spills and temporary bytes."""
    program = compiled("h200", kind, "bfloat16")
    (report,) = (path.read_text() for path in folder.glob("*.ptxas"))
    return dict(
        spills=sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", report)),
        registers=int(re.search(r"Used (\d+) registers", report).group(1)),
        serialized="wgmma.mma_async instructions are serialized" in report,
        temporary=program.memory_analysis().temp_size_in_bytes,
    )


def compile_cases(names: list[str], tpu: pathlib.Path, gpu: pathlib.Path) -> dict:
    """{case: what is known of it}; the two folders get the listings."""
    found = {}
    for name in names:
        kind, target = name.split(", ")
        on_gpu = target == "h200"
        folder = gpu if on_gpu else tpu
        found[name] = (
            compile_for_gpu(kind, folder) if on_gpu else compile_for_tpu(kind, target, folder)
        )
        for file in folder.iterdir():
            file.unlink()
    return found


def main() -> None:
    names = sys.argv[1:]
    if names == ["--record"]:
        on_tpu = [name for name in CASES if not name.endswith("h200")]
        record(BUDGETS, report_of("decode_targets", *on_tpu))
        return
    gpu = pathlib.Path(os.environ["MOSAIC_GPU_DUMP_TO"])
    with tempfile.TemporaryDirectory() as folder:
        targets.prepare_environment(bundles.FLAGS.format(folder=folder))
        jax.config.update("jax_enable_compilation_cache", False)  # a kept program dumps nothing
        print(json.dumps(compile_cases(names, pathlib.Path(folder), gpu)))


if __name__ == "__main__":
    main()
