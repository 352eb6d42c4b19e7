"""Fills `tuning.csv`: `python -m kernels_pallas.tune --target=v5e`.

Compiles each candidate for a chip, which this machine need not have, and predicts its share of the
chip's peak from the compiler's bundles; with --measure, times it on this machine's device instead.
The best candidate for each shape becomes a row.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from . import bundles, targets, tuning
from .masks import Causal, Full, Mask, Window
from .spec import Operands, Spec
from .targets import TARGETS, Target
from .tpu import cycles, flash
from .tpu.visits import Blocks, visits

LENGTHS = (32768, 8192, 2048)
MASKS = {"causal": Causal(), "full": Full(), "local": Window(4095)}
SHAPES = (("bfloat16", 128), ("bfloat16", 64), ("bfloat16", 256), ("float32", 128))
HEADS = 8  # enough to fill every core
REPEATS = 10

# Runs of 256 queries fill a 256-wide matrix unit; `ahead` pays where that unit is fast.
_BACKWARD = (Blocks(512, 512, 256), Blocks(512, 1024, 256))
_NARROW = dict(forward=(Blocks(512, 1024, 256), Blocks(1024, 1024, 256)), backward=_BACKWARD)
_WIDE = dict(
    forward=(Blocks(1024, 1024, 256, True), Blocks(2048, 2048, 256, True)), backward=_BACKWARD
)
CANDIDATES = {"v4": _NARROW, "v5e": _NARROW, "v5p": _NARROW, "v6e": _WIDE, "7x": _WIDE}


class Shape(NamedTuple):
    """The case that a row is for, except its length and kind of mask."""

    which: str  # "forward", "backward"
    dtype: str
    head_dim: int


def program(shape: Shape, mask: Mask, blocks: Blocks, length: int):
    """(function, its arguments as shapes): one call of the kernel for HEADS heads, heads first so
    that no transpose is needed around it."""
    settings = flash.Settings(blocks, blocks)
    spec = Spec(mask, shape.head_dim**-0.5)
    qkv = jax.ShapeDtypeStruct((1, HEADS, length, shape.head_dim), jnp.dtype(shape.dtype))
    x = Operands(qkv, qkv, qkv)
    if shape.which == "forward":
        return lambda x: flash.heads_major_attention(x, spec, settings), (x,)
    row = jax.ShapeDtypeStruct((1, HEADS, length), jnp.float32)
    run = lambda x, *more: flash.heads_major_gradients(x, spec, settings, *more)
    return run, (x, qkv, row, row)


def _fits(shape: Shape, blocks: Blocks) -> bool:
    """Whether the blocks fit the VMEM of the device in use."""
    _, (x, *_) = program(shape, Full(), blocks, blocks.k)
    return flash.fits(shape.which, blocks, x)


class Predicted:
    """Shares of a target's peak, from the compiler's bundles. `folder` is where the compiler writes
    its listings; one listing covers all lengths and masks whose bodies it contains."""

    source = "predicted"

    def __init__(self, target: Target, folder: str):
        self.target, self.folder, self._known = target, folder, {}

    def fits(self, shape: Shape, blocks: Blocks) -> bool:
        with jax.set_mesh(targets.mesh(self.target.name)):
            return _fits(shape, blocks)

    def share(self, shape: Shape, mask: Mask, blocks: Blocks, length: int) -> float:
        needed = visits(mask, blocks, length, length)
        known = self._known.setdefault((shape, blocks), [])
        costs = next((c for c in known if c.patterns.keys() >= set(needed.patterns)), None)
        if costs is None:
            # The shortest length that has these bodies: a backward pass over more keys than VMEM
            # holds gradients for is several kernels, and the prediction expects one.
            enough = lambda n: set(needed.patterns) <= set(visits(mask, blocks, n, n).patterns)
            shortest = next((n for n in sorted(LENGTHS) if n < length and enough(n)), length)
            costs = self.compile(shape, mask, blocks, shortest)
            known.append(costs)
        useful = cycles.useful_flops(shape.which, mask, length, shape.head_dim)
        return cycles.share(shape.which, costs, needed, blocks, shape.head_dim, useful, self.target)

    def compile(self, shape: Shape, mask: Mask, blocks: Blocks, length: int) -> cycles.Costs:
        """The costs of the bodies of the compiled kernel."""
        shutil.rmtree(self.folder, ignore_errors=True)
        os.makedirs(self.folder)
        function, arguments = program(shape, mask, blocks, length)
        targets.compile_for(self.target.name, function, *arguments)
        listing = bundles.read(self.folder, f"flash_attention_{shape.which}")
        return cycles.costs(shape.which, listing, visits(mask, blocks, length, length))


class Measured:
    """Shares of the peak of this machine's device, measured."""

    source = "measured"

    def __init__(self, target: Target):
        kind = jax.devices()[0].device_kind
        if kind != target.device_kind:
            raise SystemExit(
                f"error: --measure for {target.name} needs a {target.device_kind!r}; "
                f"this machine has {kind!r}"
            )
        self.target = target

    def fits(self, shape: Shape, blocks: Blocks) -> bool:
        return _fits(shape, blocks)

    def share(self, shape: Shape, mask: Mask, blocks: Blocks, length: int) -> float:
        function, arguments = program(shape, mask, blocks, length)
        normal = lambda key, a: jax.random.normal(key, a.shape, a.dtype)
        leaves, tree = jax.tree.flatten(arguments)
        keys = jax.random.split(jax.random.key(0), len(leaves))
        arrays = jax.tree.unflatten(tree, list(map(normal, keys, leaves)))
        run = jax.jit(function).lower(*arrays).compile()
        useful = cycles.useful_flops(shape.which, mask, length, shape.head_dim)
        return HEADS * useful / _seconds(functools.partial(run, *arrays)) / self.target.bf16_flops


def _seconds(run) -> float:
    """The shortest of REPEATS times of a call."""
    jax.block_until_ready(run())
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return min(times)


def rows(target: Target, judge, shape: Shape) -> list[tuning.Row]:
    """The best candidate for each mask and length. judge: Predicted or Measured."""
    best_rows = []
    for kind, mask in MASKS.items():
        for length in LENGTHS:
            tried = []
            for blocks in CANDIDATES[target.name][shape.which]:
                if judge.fits(shape, blocks):
                    tried.append((judge.share(shape, mask, blocks, length), blocks))
            best, blocks = max(tried, key=lambda pair: pair[0])
            best_rows.append(
                tuning.Row(
                    kernel=f"flash_attention_{shape.which}",
                    device=target.device_kind,
                    dtype=shape.dtype,
                    head_dim=shape.head_dim,
                    length=length,
                    mask=kind,
                    q=blocks.q,
                    k=blocks.k,
                    sub_q=blocks.sub_q,
                    ahead=int(blocks.ahead),
                    share=round(best, 3),
                    source=judge.source,
                )
            )
    return best_rows


def merge(old: tuple[tuning.Row, ...], new: list[tuning.Row]) -> list[tuning.Row]:
    """`old` updated with the rows of `new` for the same cases; only a measured row replaces a
    measured one."""
    case = lambda row: row[: tuning.Row._fields.index("q")]
    merged = {case(row): row for row in old}
    for row in new:
        before = merged.get(case(row))
        if before is None or before.source != "measured" or row.source == "measured":
            merged[case(row)] = row
    return list(merged.values())


def _with_targets(arguments: list[str]) -> int:
    """Runs this command again in a process with the targets' compilers on its path."""
    folder = pathlib.Path(sys.prefix) / "targets"
    if not (folder / "libtpu").is_dir():
        raise SystemExit(f"error: no compilers in {folder}; `make targets` installs them")
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "kernels_pallas.tune", *arguments]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": path}).returncode


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels_pallas.tune", description=__doc__)
    parser.add_argument("--target", required=True, choices=sorted(CANDIDATES))
    parser.add_argument("--measure", action="store_true", help="time on this machine's device")
    parser.add_argument("--head_dim", type=int, help="tune only this head dim")
    parser.add_argument("--dtype", help="tune only this dtype")
    flags = parser.parse_args(arguments)
    target = TARGETS[flags.target]
    if not flags.measure and importlib.util.find_spec("libtpu") is None:
        return _with_targets(arguments)
    with tempfile.TemporaryDirectory() as folder:
        if flags.measure:
            judge = Measured(target)
        else:
            targets.prepare_environment(bundles.FLAGS.format(folder=folder))
            judge = Predicted(target, folder)
        for dtype, head_dim in SHAPES:
            if flags.head_dim not in (None, head_dim) or flags.dtype not in (None, dtype):
                continue
            for which in ("forward", "backward"):
                new = rows(target, judge, Shape(which, dtype, head_dim))
                tuning.write(merge(tuning.read(), new))
                for row in new:
                    print(*row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
