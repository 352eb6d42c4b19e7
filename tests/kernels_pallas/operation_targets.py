"""Compiles the kernels of grouped matmul, linear cross-entropy and the selective scan for chips
that are not here.

A process of its own (see `main`); `python -m tests.kernels_pallas.operation_targets --record`
writes the bundle budgets of this jax.
"""

import functools
import json
import os
import pathlib
import re
import sys
import tempfile

import jax
import jax.numpy as jnp

from kernels_pallas import bundles, targets
from kernels_pallas.chunked_cross_entropy import Spec
from kernels_pallas.gpu import grouped_matmul as gpu_grouped
from kernels_pallas.gpu import linear_cross_entropy as gpu_loss
from kernels_pallas.tpu import grouped_matmul as tpu_grouped
from kernels_pallas.tpu import linear_cross_entropy as tpu_loss
from kernels_pallas.tpu import selective_scan as tpu_scan

from .target_process import record, report_of

BUDGETS = pathlib.Path(__file__).parent / "operation_bundles.json"
TPUS = ("v4", "v5e", "v5p", "v6e", "7x")
TOKENS, EMBED, WIDTH, GROUPS, VOCAB = 16384, 1024, 1408, 8, 50257
DTYPE = jnp.dtype("bfloat16")


def _like(*dims, dtype=DTYPE):
    return jax.ShapeDtypeStruct(dims, dtype)


SIZES = _like(GROUPS, dtype=jnp.int32)
IDS = _like(TOKENS, dtype=jnp.int32)
ROW = _like(TOKENS, dtype=jnp.float32)
X, WEIGHT, EXPERTS = _like(TOKENS, EMBED), _like(EMBED, VOCAB), _like(GROUPS, EMBED, WIDTH)
GRAD = _like(TOKENS, WIDTH)


def grouped(kernels) -> dict:
    """{name: (function, arguments)} of the three products of a grouped matmul."""
    product = lambda transposed: lambda a, b, sizes: kernels.product(a, b, sizes, DTYPE, transposed)
    outer = lambda a, b, sizes: kernels.outer(a, b, sizes, DTYPE)
    return {
        "grouped_matmul": (product(False), (X, EXPERTS, SIZES)),
        "grouped_matmul, transposed": (product(True), (GRAD, EXPERTS, SIZES)),
        "grouped_outer": (outer, (X, GRAD, SIZES)),
    }


def losses_on_tpu(cap: float | None) -> dict:
    spec, settings = Spec(cap), tpu_loss.DEFAULT
    forward = functools.partial(tpu_loss.forward, spec=spec, settings=settings, mean=True)
    gradient = functools.partial(
        tpu_loss.weight_gradient, dtype=jnp.float32, spec=spec, settings=settings
    )
    return {
        "linear_cross_entropy_forward": (forward, (X, WEIGHT, IDS)),
        "linear_cross_entropy_weight_gradient": (gradient, (X, WEIGHT, IDS, ROW, ROW, ROW)),
    }


def scans() -> dict:
    of = functools.partial(_like, dtype=jnp.float32)
    rows, columns, state = of(1, 256, 512), of(1, 16, 256), of(1, 16, 512)
    arrays = (rows, rows, of(16, 512), columns, columns)
    forward = functools.partial(tpu_scan.forward, settings=tpu_scan.DEFAULT)
    backward = functools.partial(tpu_scan.backward, tpu_scan.DEFAULT)
    cases = {}
    for name, keep in (("", ()), (", segments", (of(1, 1, 256),))):
        residuals = (*arrays, keep, of(1, 2, 16, 512))
        cases[f"selective_scan_forward{name}"] = (forward, (*arrays, state, keep))
        cases[f"selective_scan_backward{name}"] = (backward, (residuals, (rows, state)))
    return cases


def losses_on_gpu(cap: float | None) -> dict:
    forward = lambda x, w, targets: gpu_loss.forward(x, w, targets, Spec(cap))
    return {f"linear_cross_entropy, cap {cap}": (forward, (X, WEIGHT, IDS))}


TPU_CASES = {"grouped": grouped(tpu_grouped), "loss": losses_on_tpu(None), "scan": scans()}
FEWER_TPUS = {"scan": ("v5e", "v6e")}
GPU_CASES = {"grouped": grouped(gpu_grouped), "loss": losses_on_gpu(None) | losses_on_gpu(30.0)}


def compile_tpu(which: str, folder: pathlib.Path) -> dict:
    """{"kernel, target": bundles and spills}."""
    found = {}
    for target in FEWER_TPUS.get(which, TPUS):
        for name, (function, arguments) in TPU_CASES[which].items():
            targets.compile_for(target, function, *arguments)
            got = bundles.read(folder, name.split(",")[0])
            found[f"{name}, {target}"] = dict(
                always=got.always, bodies=got.bodies, spills=got.spills
            )
            for file in folder.iterdir():
                file.unlink()
    return found


def compile_gpu(which: str, folder: pathlib.Path) -> dict:
    """{kernel: registers and spills}."""
    found = {}
    for name, (function, arguments) in GPU_CASES.get(which, {}).items():
        targets.compile_for("h200", function, *arguments)
        (report,) = (path.read_text() for path in folder.glob("*.ptxas"))
        found[name] = dict(
            spills=sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", report)),
            registers=int(re.search(r"Used (\d+) registers", report).group(1)),
            serialized="wgmma.mma_async instructions are serialized" in report,
        )
        for file in folder.iterdir():
            file.unlink()
    return found


def main() -> None:
    if "--record" in sys.argv:
        reports = [report_of("operation_targets", which)["tpu"] for which in TPU_CASES]
        record(BUDGETS, {name: got for report in reports for name, got in report.items()})
        return
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        targets.prepare_environment(bundles.FLAGS.format(folder=folder))
        tpu = compile_tpu(sys.argv[1], folder)
    gpu = compile_gpu(sys.argv[1], pathlib.Path(os.environ["MOSAIC_GPU_DUMP_TO"]))
    print(json.dumps(dict(tpu=tpu, gpu=gpu)))


if __name__ == "__main__":
    main()
