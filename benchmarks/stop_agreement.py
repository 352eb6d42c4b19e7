"""Cost per step of two processes agreeing on whether to stop.

    python -m benchmarks.stop_agreement

Two processes with one device each on this machine run the same steps (some matmuls, and a norm
summed over both), alternating 20 steps with and 20 without the agreement after each step. Prints a
JSON object with the median milliseconds per step.
"""

import json
import os
import socket
import subprocess
import sys
import time

STEPS, TURNS = 20, 15


def measure(index: int, port: int) -> dict:
    """Runs process `index` and returns its times."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    from genai_jax.training.distributed import DistributedConfig, join_processes
    from genai_jax.training.sharding import MeshConfig, make_mesh
    from genai_jax.training.stop_signal import StopSignal

    def step(x):
        for _ in range(4):
            x = jnp.tanh(x @ x) * 0.01
        return x, jnp.sum(x * x)

    place = DistributedConfig(f"127.0.0.1:{port}", 2, index)
    with join_processes(place), StopSignal() as stop:
        mesh = make_mesh(MeshConfig())
        split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
        blocks = np.ones((2, 512, 512), np.float32)
        x = jax.make_array_from_callback(blocks.shape, split, lambda i: blocks[i])
        step = jax.jit(step, out_shardings=(split, whole), donate_argnums=0)
        times = {"without": [], "with": []}
        for turn in range(2 * TURNS + 2):
            asks, metric, began = turn % 2, None, time.perf_counter()
            for _ in range(STEPS):
                before = metric
                x, metric = step(x)
                if before is not None:  # as the training loop: read while the next step runs
                    float(before)
                if asks:
                    stop.ask()
            x.block_until_ready()
            if turn > 1:  # the first turns compile
                took = 1e3 * (time.perf_counter() - began) / STEPS
                times["with" if asks else "without"].append(took)
        return {f"{name}_ms": round(float(np.median(ms)), 3) for name, ms in times.items()}


def main():
    if len(sys.argv) == 3:
        print(json.dumps(measure(int(sys.argv[1]), int(sys.argv[2]))))
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.stop_agreement", str(index), port],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [process.communicate()[0] for process in processes]
    print(outputs[0].strip().splitlines()[-1])


if __name__ == "__main__":
    main()
