"""Decoding pictures, and the share of a train step's time that is spent waiting for them.

    python -m benchmarks.pictures [--pictures=5000] [--size=256] [--image_size=64] [--steps=40]

Writes synthetic JPEGs and measures pictures per second, decoded and resized: in this thread (the
baseline), in threads as the data sets do it, and in as many processes. Then trains a small
diffusion model with every picture decoded anew for each batch, as for data that do not fit into
memory, and next to it on pictures that are decoded already. The wait is the time that `next` of the
prefetching iterator takes in the loop. Prints a JSON object.
"""

import argparse
import functools
import io
import json
import os
import pathlib
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np

from genai_jax.data.images import collection
from genai_jax.data.images.decoding import decode

SKIPPED = 5  # steps before the clock starts: compilation, and a full prefetch buffer
NETWORK = (
    "--task=diffusion", "--data.batch_size=16", "--unet.channels=16",
    "--unet.channel_multipliers=1,2,2", "--unet.blocks_per_level=1", "--unet.scan_blocks=false",
    "--unet.attention_resolutions=16", "--train.progress=false",
)  # fmt: skip


def write_pictures(folder: pathlib.Path, count: int, size: int):
    """Smooth random JPEGs with some noise, about as large as photographs."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (12, 12, 3)).astype(np.uint8))
        smooth = np.asarray(small.resize((size, size), Image.Resampling.BICUBIC), np.float32)
        noisy = np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noisy).save(file, "JPEG", quality=85)
        (folder / f"{i:05}.jpg").write_bytes(file.getvalue())


def decode_file(path: pathlib.Path, shape: tuple[int, int, int]) -> np.ndarray:
    return decode(path.read_bytes(), slice(None), shape)


def rates(paths: list[pathlib.Path], shape: tuple[int, int, int]) -> dict[str, float]:
    """Pictures per second in this thread, in threads, and in processes that are running already."""
    work = functools.partial(decode_file, shape=shape)
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as processes:
        ways = {
            "one_thread": lambda: [work(path) for path in paths],
            "threads": lambda: list(collection.in_threads(work, paths)),
            "processes": lambda: list(processes.map(work, paths, chunksize=64)),
        }
        list(processes.map(work, paths[: 8 * cores]))  # imports
        result = {}
        for name, run in ways.items():
            began = time.perf_counter()
            run()
            result[name] = round(len(paths) / (time.perf_counter() - began), 1)
    return result


def waiting(folder: pathlib.Path, image_size: int, steps: int, in_memory: int) -> dict[str, float]:
    """The median time of a step, and the share of all steps' time that waits for data."""
    import jax

    from genai_jax.components import make_task, parse_run
    from genai_jax.training.batches import BatchPlacement
    from genai_jax.training.execution import build
    from genai_jax.training.sharding import batch_shardings, make_mesh, mesh_context

    collection.IN_MEMORY = in_memory
    flags = (*NETWORK, f"--data.dataset=images:{folder}", f"--data.image_size={image_size}")
    config = parse_run(flags)
    task, mesh = make_task(config), make_mesh(config.mesh)
    spec = task.data.batch_spec
    placement = BatchPlacement(spec, batch_shardings(spec, mesh))
    waits, times = [], []
    with mesh_context(mesh):
        compiled = build(task, config, mesh)
        state = compiled.init(jax.random.key(0))
        batches = task.data.train(placement.rows)
        for number in range(SKIPPED + steps):
            began = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - began
            state, report = compiled.step(state, placement.to_devices(batch))
            jax.block_until_ready(report)
            if number >= SKIPPED:
                waits.append(waited)
                times.append(time.perf_counter() - began)
        batches.close()
    share = 100 * sum(waits) / sum(times)
    return {"step_s": round(statistics.median(times), 4), "waiting_percent": round(share, 2)}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("pictures", 5000), ("size", 256), ("image_size", 64), ("steps", 40)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        os.environ["XDG_CACHE_HOME"] = place  # nothing is left, and nothing is there
        folder = pathlib.Path(place) / "pictures"
        folder.mkdir()
        write_pictures(folder, options.pictures, options.size)
        paths = sorted(folder.iterdir())
        shape = (options.image_size, options.image_size, 3)
        report = {
            "pictures": options.pictures,
            "kilobytes_each": round(sum(p.stat().st_size for p in paths) / len(paths) / 1000, 1),
            "cores": len(os.sched_getaffinity(0)),
            "pictures_per_second": rates(paths, shape),
            "pictures_per_second_full_size": rates(paths, (options.size, options.size, 3)),
        }
        for name, bound in (("batch_by_batch", 0), ("in_memory", 2 << 30)):
            report[name] = waiting(folder, options.image_size, options.steps, bound)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
