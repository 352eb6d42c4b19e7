"""Speed and error of the kernels compared with other implementations, in one process.

    python -m kernels_pallas.benchmark                    # on this machine's device
    python -m kernels_pallas.benchmark --target=h200      # compiles for a chip this machine lacks

Each round times every contender of a contest once, so that disturbances of the machine affect all
of them alike; the medians are reported. The achieved TFLOP/s (GB/s where memory bandwidth bounds
the call) are compared with the chip's datasheet and with a yardstick timed in the same rounds: a
large matmul (a large copy). Writes benchmark.json and benchmark.png to --output.
"""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from . import device, targets
from .contests import CONTESTS, Contest, random_arrays

MATMUL = {"cpu": 1024}  # size of the large matmul; 8192 elsewhere
COPIED = {"cpu": 1 << 26}  # bytes of the large copy; 4 GiB elsewhere


def main(arguments: list[str] | None = None) -> list[dict]:
    """Prints the table and returns its rows."""
    chosen = _parse(arguments)
    if chosen.target:
        targets.prepare_environment()
    platform = device.platform()
    if chosen.target:
        platform = targets.TARGETS[chosen.target].platform
    dtype = jnp.dtype(chosen.dtype or ("float32" if platform == "cpu" else "bfloat16"))
    rows = []
    for kind in chosen.contests:
        for contest in CONTESTS[kind](platform, dtype):
            run = _compile if chosen.target else _hold
            new_rows = run(contest, chosen, dtype)
            _print(contest, new_rows)
            rows += new_rows
    if chosen.output:
        _write(rows, pathlib.Path(chosen.output), chosen.target)
    return rows


def _parse(arguments) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--contests",
        default=",".join(CONTESTS),
        help="comma-separated, from " + ", ".join(CONTESTS),
    )
    parser.add_argument(
        "--rounds", type=int, default=11, help="number of rounds; the median is reported"
    )
    parser.add_argument("--dtype", help="default: bfloat16, on a CPU float32")
    parser.add_argument("--target", help="compile for one of " + ", ".join(targets.TARGETS))
    parser.add_argument("--output", help="folder for benchmark.json and benchmark.png")
    chosen = parser.parse_args(arguments)
    chosen.contests = chosen.contests.split(",")
    for kind in chosen.contests:
        if kind not in CONTESTS:
            parser.error(f"--contests: {kind!r} is unknown; allowed: {', '.join(CONTESTS)}")
    if chosen.target and chosen.target not in targets.TARGETS:
        known = ", ".join(targets.TARGETS)
        parser.error(f"--target: {chosen.target!r} is unknown; allowed: {known}")
    if chosen.rounds < 1:
        parser.error(f"--rounds is {chosen.rounds}; allowed: at least 1")
    return chosen


def _hold(contest: Contest, chosen, dtype) -> list[dict]:
    """Times every contender; one that fails gets a reason instead of a time."""
    arrays = random_arrays(contest.sizes, contest.integers)
    calls, failed = {}, {}
    for name, function in contest.contenders.items():
        try:
            calls[name] = _ready(contest, function, arrays)
        except Exception as error:  # the other contenders still run
            failed[name] = _one_line(error)
    calls["yardstick"] = _yardstick(contest, dtype)
    seconds = _rounds(calls, chosen.rounds)
    best = (2 * MATMUL.get(device.platform(), 8192) ** 3) / seconds["yardstick"]
    if not contest.flops:
        best = 2 * COPIED.get(device.platform(), 1 << 32) / seconds["yardstick"]
    work, peak = contest.flops or contest.bytes, _datasheet(contest)
    rows = []
    for name, function in contest.contenders.items():
        row = dict(contest=contest.name, contender=name)
        if name in failed:
            rows.append(row | dict(failed=failed[name]))
            continue
        rate = work / seconds[name]
        row |= dict(seconds=seconds[name], unit="TFLOP/s" if contest.flops else "GB/s")
        row |= dict(rate=rate / (1e12 if contest.flops else 1e9), of_yardstick=rate / best)
        row |= dict(of_datasheet=rate / peak if peak else None)
        rows.append(row | dict(error=_error(contest, function)))
    return rows


def _ready(contest: Contest, function, arrays):
    """The compiled call, as a function without arguments that has run once."""
    if contest.backward:
        pull = jax.jit(lambda *a: jax.vjp(function, *a)[1])(*arrays)
        cotangent = random_arrays(contest.sizes[:1], {}, seed=1)[0]
        pull_back = jax.jit(lambda pull, cotangent: pull(cotangent))
        call = lambda: pull_back(pull, cotangent)
    else:
        compiled = jax.jit(function)
        call = lambda: compiled(*arrays)
    jax.block_until_ready(call())
    return call


def _yardstick(contest: Contest, dtype):
    """A large matmul, or a large copy where memory bandwidth bounds the call."""
    if contest.flops:
        size = MATMUL.get(device.platform(), 8192)
        a = random_arrays((jax.ShapeDtypeStruct((size, size), dtype),), {})[0]
        function = jax.jit(lambda a: a @ a)
    else:
        a = jnp.zeros(COPIED.get(device.platform(), 1 << 32) // 4, jnp.int32)
        function = jax.jit(lambda a: a + 1)
    jax.block_until_ready(function(a))
    return lambda: function(a)


def _rounds(calls: dict, rounds: int) -> dict[str, float]:
    """Median seconds of each call; every round runs each of them once."""
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def _datasheet(contest: Contest) -> float | None:
    kind = device.device_kind()
    known = [t for t in targets.TARGETS.values() if t.device_kind == kind]
    if not known:
        return None
    return known[0].bf16_flops if contest.flops else known[0].hbm_bytes


def _error(contest: Contest, function) -> float:
    """The largest deviation from the exact result on the small call, over its largest value."""
    arrays = random_arrays(contest.small, contest.integers, seed=2)
    exact = [a.astype(jnp.float32) if a.dtype != jnp.int32 else a for a in arrays]
    with jax.default_matmul_precision("highest"):
        want = _outputs(contest, contest.exact, exact)
    got = _outputs(contest, function, arrays)
    worst = 0.0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        worst = max(worst, float(np.abs(a - b).max() / np.abs(b).max()))
    return worst


def _outputs(contest: Contest, function, arrays):
    if not contest.backward:
        return jax.jit(function)(*arrays)
    cotangent = random_arrays(contest.small[:1], {}, seed=3)[0]

    def pull(*arrays):
        out, pull = jax.vjp(function, *arrays)
        return pull(cotangent.astype(out.dtype))

    return jax.jit(pull)(*arrays)


def _compile(contest: Contest, chosen, dtype) -> list[dict]:
    """Compiles every contender for the target; reports compile time and temporary memory."""
    rows = []
    for name, function in contest.contenders.items():
        row = dict(contest=contest.name, contender=name, target=chosen.target)
        run, sizes = function, contest.sizes
        if contest.backward:
            run = lambda g, *a, function=function: jax.vjp(function, *a)[1](g)
            sizes = (contest.sizes[0], *contest.sizes)
        start = time.perf_counter()
        try:
            memory = targets.compile_for(chosen.target, run, *sizes).memory_analysis()
        except Exception as error:  # what the compiler says about this contender
            rows.append(row | dict(failed=_one_line(error)))
            continue
        took = time.perf_counter() - start
        temporary = memory.temp_size_in_bytes / 2**20
        rows.append(row | dict(compile_seconds=took, temporary_mib=temporary))
    return rows


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:120]


def _print(contest: Contest, rows: list[dict]):
    print(f"\n{contest.name}")
    for row in rows:
        print(f"  {row['contender']:16}", _cells(row), flush=True)


def _cells(row: dict) -> str:
    if "failed" in row:
        return row["failed"]
    if "target" in row:
        compiled = f"compiled for {row['target']} in {row['compile_seconds']:.1f} s"
        return f"{compiled}, {row['temporary_mib']:.1f} MiB of temporary memory"
    sheet = row["of_datasheet"]
    return (
        f"{1e3 * row['seconds']:10.3f} ms {row['rate']:9.3f} {row['unit']}"
        f" {100 * row['of_yardstick']:6.1f} % of the yardstick"
        + (f" {100 * sheet:6.1f} % of the datasheet" if sheet else "")
        + f"  error {row['error']:.1e}"
    )


def _write(rows: list[dict], folder: pathlib.Path, target: str | None):
    folder.mkdir(parents=True, exist_ok=True)
    about = dict(
        date=datetime.date.today().isoformat(),
        jax=jax.__version__,
        python=sys.version.split()[0],
        device=target or device.device_kind(),
    )
    (folder / "benchmark.json").write_text(
        json.dumps(about | dict(rows=rows), indent=1) + "\n", encoding="utf-8"
    )
    timed = [row for row in rows if "rate" in row]
    if timed:
        _draw(timed, about, folder / "benchmark.png")


def _draw(rows: list[dict], about: dict, path: pathlib.Path):
    """Bars, grouped by contest: the rate of each contender as a share of the yardstick's."""
    import matplotlib.figure

    contests = list(dict.fromkeys(row["contest"] for row in rows))
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    figure = matplotlib.figure.Figure((9, 1 + 0.22 * len(rows)), layout="constrained")
    axes = figure.subplots()
    height, ticks, y = 1.0, [], 0.0
    for contest in contests:
        here = [row for row in rows if row["contest"] == contest]
        ticks.append(y + height * (len(here) - 1) / 2)
        for row in here:
            color = f"C{contenders.index(row['contender'])}"
            axes.barh(y, 100 * row["of_yardstick"], height * 0.9, color=color)
            axes.text(100 * row["of_yardstick"], y, f" {row['contender']}", va="center", fontsize=7)
            y += height
        y += 0.8
    axes.set_yticks(ticks, contests, fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("% of the FLOP/s of a large matmul (of the bytes/s of a large copy)")
    axes.set_title(f"{about['device']}, jax {about['jax']}, {about['date']}", fontsize=9)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
