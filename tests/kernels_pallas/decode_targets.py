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
TPUS = ("v4", "v5e", "v5p", "v6e", "7x")

# kind: what it is compiled as on v4, which has no int8, and elsewhere
CASES = {
    "contiguous": ("bfloat16", "bfloat16"),
    "paged": ("bfloat16", "int8"),
    "ring": ("bfloat16", "bfloat16"),
}


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


def compile_tpu(folder: pathlib.Path) -> dict:
    """{"kind, target": bundles, spills and temporary bytes}."""
    found = {}
    for target in TPUS:
        for kind, dtypes in CASES.items():
            program = compiled(target, kind, dtypes[target != "v4"])
            got = bundles.read(folder, "decode_attention")
            found[f"{kind}, {target}"] = dict(
                always=got.always,
                bodies=got.bodies,
                spills=got.spills,
                temporary=program.memory_analysis().temp_size_in_bytes,
            )
            for file in folder.iterdir():
                file.unlink()
    return found


def compile_gpu(folder: pathlib.Path) -> dict:
    """{kind: registers, spills and temporary bytes}."""
    found = {}
    for kind in CASES:
        program = compiled("h200", kind, "bfloat16")
        (report,) = (path.read_text() for path in folder.glob("*.ptxas"))
        found[kind] = dict(
            spills=sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", report)),
            registers=int(re.search(r"Used (\d+) registers", report).group(1)),
            serialized="wgmma.mma_async instructions are serialized" in report,
            temporary=program.memory_analysis().temp_size_in_bytes,
        )
        for file in folder.iterdir():
            file.unlink()
    return found


def main() -> None:
    if "--record" in sys.argv:
        record(BUDGETS, report_of("decode_targets")["tpu"])
        return
    with tempfile.TemporaryDirectory() as folder:
        targets.prepare_environment(bundles.FLAGS.format(folder=folder))
        jax.config.update("jax_enable_compilation_cache", False)  # a kept program dumps nothing
        gpu = compile_gpu(pathlib.Path(os.environ["MOSAIC_GPU_DUMP_TO"]))
        tpu = compile_tpu(pathlib.Path(folder))
    print(json.dumps(dict(tpu=tpu, gpu=gpu)))


if __name__ == "__main__":
    main()
