"""The commands, run as a user runs them."""

import json
import os
import subprocess
import sys

from tests.conftest import FAST_COMPILATION, ROOT

# A model so small that a command's time is its imports.
TINY = (
    "--data.batch_size=8",
    "--data.sequence_length=32",
    "--transformer.num_layers=2",
    "--transformer.embed_dim=16",
    "--transformer.num_heads=2",
    "--train.progress=false",
    "--optimizer.warmup_steps=1",
)


def environment(devices: int = 1) -> dict[str, str]:
    """The tests' environment with so many simulated devices."""
    flags = f"{FAST_COMPILATION} {os.environ.get('XLA_FLAGS', '')}"
    ours = {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
    if devices > 1:
        # Simulated devices wait for each other in collectives, each wait on a thread of XLA's own.
        # A device may be in several at once: with as many threads as devices, as is the default,
        # all of them can wait for a collective that no thread is left to run.
        ours["NPROC"] = str(8 * devices)
    return os.environ | ours


def start(module: str, *flags: str, devices: int = 1, **options) -> subprocess.Popen:
    """Starts ``python -m genai_jax.<module> flags`` in the background."""
    command = [sys.executable, "-m", f"genai_jax.{module}", *flags]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env=environment(devices), cwd=ROOT, **pipes, **options)


def run(module: str, *flags: str, code: int = 0, devices: int = 1, **options) -> tuple[str, str]:
    """Runs a command to its end, checks its exit code, returns (stdout, stderr)."""
    process = start(module, *flags, devices=devices, **options)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return out, err


def report_of(script: str, *arguments: str) -> dict:
    """The JSON that a script of the tests prints as its last line, on eight simulated devices."""
    result = subprocess.run(
        [sys.executable, str(ROOT / "tests" / script), *arguments],
        env=environment(devices=8), cwd=ROOT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])
