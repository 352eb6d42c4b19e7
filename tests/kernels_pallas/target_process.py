"""Runs a module of these tests in a process that finds the compilers of `make targets`."""

import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from importlib.metadata import version

import pytest

# Not that of tests.conftest, whose settings are for a CPU alone.
ROOT = pathlib.Path(__file__).parent.parent.parent
COMPILERS = pathlib.Path(sys.prefix) / "targets"
GROWTH = 1.03
TIMEOUT = 800  # seconds; a compiler that hangs is to be named, not waited for
VERSION = f"jax {version('jax')}"


def need(package: str) -> None:
    """Skips a test where the compiler ("libtpu", "jax_cuda13_plugin") is not installed."""
    if not (COMPILERS / package).is_dir():
        pytest.skip(f"no {package} in {COMPILERS}: `make targets`")


def cases(names, smoke: str) -> list:
    """`names` as parameters of a test; on the newest jax only those that contain `smoke`."""
    return [pytest.param(n, marks=pytest.mark.smoke if smoke in n else ()) for n in names]


def asked(request, parameter: str) -> list[str]:
    """What the selected tests of the requesting file have as `parameter`, in order.

    A module compiles these alone: some minutes less where few of the tests are selected.
    """
    here = (item for item in request.session.items if item.path == request.path)
    parameters = [item.callspec.params for item in here if hasattr(item, "callspec")]
    return list(dict.fromkeys(p[parameter] for p in parameters if parameter in p))


@functools.cache
def report_of(module: str, *arguments: str):
    """What `python -m tests.kernels_pallas.<module>` prints as its last line, JSON.

    A module of another folder has a name that begins with "tests.".
    The process finds an empty folder in MOSAIC_GPU_DUMP_TO, for the reports of the GPU's assembler.
    """
    name = module if module.startswith("tests.") else f"tests.kernels_pallas.{module}"
    command = [sys.executable, "-m", name, *arguments]
    path = os.pathsep.join((str(COMPILERS), os.environ.get("PYTHONPATH", "")))
    with tempfile.TemporaryDirectory() as folder:
        more = dict(MOSAIC_GPU_DUMP_PTXAS="1", MOSAIC_GPU_DUMP_TO=folder, PYTHONPATH=path)
        done = subprocess.run(
            command,
            env=os.environ | more,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def budgets(path: pathlib.Path) -> dict:
    """{case: bundles} that were recorded with this jax; skips the test if none were."""
    recorded = json.loads(path.read_text()).get(VERSION)
    if recorded is None:
        module = path.stem.replace("_bundles", "_targets")
        pytest.skip(f"no budgets for {VERSION}: python -m tests.kernels_pallas.{module} --record")
    return recorded


def check_bundles(got: dict, budget: dict) -> None:
    """Asserts that no loop body of a kernel takes over 3 % more instructions than recorded."""
    assert len(got["bodies"]) == len(budget["bodies"])
    for now, then in zip(got["bodies"], budget["bodies"], strict=True):
        assert now <= GROWTH * then
    assert got["always"] <= GROWTH * budget["always"]


def record(path: pathlib.Path, found: dict) -> None:
    """Makes what this jax compiles the budget."""
    recorded = json.loads(path.read_text()) if path.exists() else {}
    recorded[VERSION] = found
    path.write_text(json.dumps(recorded, sort_keys=True).replace("}, ", "},\n") + "\n")
