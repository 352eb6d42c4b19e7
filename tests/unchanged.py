"""Tests that run again only when what they depend on has changed.

Compiling kernels and pod programs for chips that are not here, running kernels in interpreters of
TPUs and GPUs, training with every choice of every flag, and whole notebooks and runs of several
devices and processes take minutes, and depend on some files and on the versions of jax and of the
compilers. A test says so with
`@pytest.mark.depends_on("kernels")`, a name of `GROUPS`. `tests/golden/unchanged.json` holds, per
group, the hash of its files and the versions with which all of its tests passed; where both match,
the tests of the group are skipped. `make record` runs the groups and rewrites the file, `make
test_all` does so as part of the whole suite.

`python -m tests.unchanged` exits with 1 if a group that needs the compilers has to run: they are
most of a gigabyte, and `make test` installs them only then.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import platform
import sys
from collections import Counter
from importlib.metadata import version
from typing import NamedTuple

import pytest

from kernels_pallas.target_packages import packages

ROOT = pathlib.Path(__file__).parent.parent
RECORD = ROOT / "tests" / "golden" / "unchanged.json"
MARK = "depends_on"
PROCESS = "tests/kernels_pallas/target_process.py"


class Group(NamedTuple):
    """What the results of some tests depend on."""

    files: tuple[str, ...]  # globs, relative to the repository; each matches at least one file
    packages: tuple[str, ...] = ()  # besides jax and jaxlib; "python" for the version of Python
    compilers: bool = True  # those of `make targets`


GROUPS = {
    "kernels": Group(
        (
            "kernels_pallas/**/*.py",
            "kernels_pallas/tuning.csv",
            "kernels_pallas/gpu/*.txtpb",
            "tests/kernels_pallas/*targets*.py",
            "tests/kernels_pallas/*_bundles.json",
            PROCESS,
        )
    ),
    "interpreted GPU kernels": Group(
        (
            "kernels_pallas/**/*.py",
            "kernels_pallas/tuning.csv",
            "tests/kernels_pallas/*cases.py",
            "tests/kernels_pallas/tpu_calls.py",
            "tests/kernels_pallas/test_decoding_gpu.py",
            "tests/kernels_pallas/test_gpu_flash.py",
            "tests/kernels_pallas/test_grouped_matmul.py",
            "tests/kernels_pallas/test_linear_cross_entropy.py",
        ),
        compilers=False,
    ),
    "interpreted TPU kernels": Group(
        (
            "kernels_pallas/**/*.py",
            "kernels_pallas/tuning.csv",
            "tests/kernels_pallas/*cases.py",
            "tests/kernels_pallas/ring_devices.py",
            "tests/kernels_pallas/test_chunked.py",
            "tests/kernels_pallas/test_decoding.py",
            "tests/kernels_pallas/test_decoding_tpu.py",
            "tests/kernels_pallas/test_ring.py",
            "tests/kernels_pallas/test_selective_scan.py",
            "tests/kernels_pallas/test_tpu_flash.py",
            "tests/kernels_pallas/test_tpu_partition.py",
            "tests/kernels_pallas/tpu_*.py",
        ),
        compilers=False,
    ),
    "compiler options": Group(
        (
            "genai_jax/config.py",
            "genai_jax/training/compiler.py",
            "kernels_pallas/target*.py",
            "kernels_pallas/gpu/*.txtpb",
            "tests/training/*compiler_targets.py",
            PROCESS,
        )
    ),
    "pods": Group(
        (
            "genai_jax/*.py",
            "genai_jax/data/**/*.py",
            "genai_jax/losses/**/*.py",
            "genai_jax/networks/**/*.py",
            "genai_jax/scaling/**/*.py",
            "genai_jax/tasks/**/*.py",
            "genai_jax/training/**/*.py",
            "kernels_pallas/**/*.py",
            "kernels_pallas/tuning.csv",
            "experiments/pods/*.flags",
            "experiments/pods/shapes/*.flags",
            "tests/test_pods_compile.py",
            PROCESS,
        ),
        ("flax", "optax"),
    ),
    "every flag": Group(
        (
            "genai_jax/*.py",
            "genai_jax/data/**/*.py",
            "genai_jax/diffusion/*.py",
            "genai_jax/losses/*.py",
            "genai_jax/networks/**/*.py",
            "genai_jax/tasks/**/*.py",
            "genai_jax/training/*.py",
            "kernels_pallas/*.py",
            "tests/every_flag.py",
            "tests/golden/every_flag.json",
        ),
        ("flax", "optax", "orbax-checkpoint"),
        compilers=False,
    ),
    "whole runs": Group(
        (
            "genai_jax/**/*.py",
            "genai_jax/**/*.json",
            "kernels_pallas/**/*.py",
            "kernels_pallas/tuning.csv",
            "experiments/pods/*.flags",
            "experiments/pods/shapes/*.flags",
            "experiments/quickstart/*.flags",
            "colabs/*.ipynb",
            "colabs/run.py",
            "docs/python.md",
            "benchmarks/roll_call.py",
            "tests/commands.py",
            "tests/conftest.py",
            "tests/families.py",
            "tests/fuzz*.py",
            "tests/kill.py",
            "tests/lives.py",
            "tests/networks/experts/test_mixture.py",
            "tests/networks/parallel/*.py",
            "tests/networks/sequence/eight_devices_mixers.py",
            "tests/networks/sequence/recurrence.py",
            "tests/networks/sequence/test_recurrent_mixers.py",
            "tests/tasks/eight_devices.py",
            "tests/tasks/autoencoder/eight_devices_vq.py",
            "tests/tasks/runs.py",
            "tests/tasks/test_eight_devices.py",
            "tests/test_colabs.py",
            "tests/test_fuzz.py",
            "tests/test_kill.py",
            "tests/test_python_guide.py",
            "tests/test_train.py",
            "tests/training/*_of_eight.py",
            "tests/training/*_on_eight.py",
            "tests/training/eight_devices*.py",
            "tests/training/test_own_step.py",
            "tests/training/test_processes.py",
            "tests/training/test_sharding.py",
            "tests/training/test_step.py",
        ),
        ("python", "flax", "optax", "orbax-checkpoint", "grain", "matplotlib", "nbclient"),
        compilers=False,
    ),
}


def files_hash(group: str) -> str:
    """A hash of the names and contents of the group's files."""
    paths = set()
    for pattern in GROUPS[group].files:
        matching = {path for path in ROOT.glob(pattern) if path.is_file()}
        if not matching:
            raise ValueError(f"tests/unchanged.py: no file matches {pattern!r} of {group!r}")
        paths |= matching
    every = hashlib.sha256()
    for name in sorted(path.relative_to(ROOT).as_posix() for path in paths):
        content = hashlib.sha256((ROOT / name).read_bytes()).hexdigest()
        every.update(f"{name} {content}\n".encode())
    return every.hexdigest()[:16]


def versions(group: str) -> str:
    """The versions that the group's results depend on; of compilers, what this jax asks for."""
    names = ("jax", "jaxlib", *GROUPS[group].packages)
    compilers = packages() if GROUPS[group].compilers else ()
    python = ".".join(platform.python_version_tuple()[:2])
    found = (f"{name}=={python if name == 'python' else version(name)}" for name in names)
    return ", ".join((*found, *compilers))


def read() -> dict:
    """{group: {"files": hash, "passed_with": versions}}."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def is_unchanged(group: str) -> bool:
    """Whether the group passed with these very files and versions."""
    recorded = read().get(group)
    return (
        recorded is not None
        and recorded["files"] == files_hash(group)
        and versions(group) in recorded["passed_with"]
    )


def record(group: str, files: str) -> None:
    """Writes that the group passed with `files`, a hash, and the versions installed now."""
    every = read()
    before = every.get(group, {})
    passed_with = {versions(group)}
    if before.get("files") == files:
        passed_with.update(before["passed_with"])
    every[group] = {"files": files, "passed_with": sorted(passed_with)}
    RECORD.write_text(json.dumps(every, indent=2, sort_keys=True) + "\n")


class Recorder:
    """Counts, in the process that gathers all reports, the passed tests of each group."""

    def __init__(self):
        self.before = {group: files_hash(group) for group in GROUPS}
        self.passed, self.size = Counter(), {}

    def pytest_runtest_logreport(self, report):
        for name, (group, size) in report.user_properties:
            if name == MARK:
                self.size[group] = size
                self.passed[group] += report.when == "call" and report.passed
                # A teardown that fails undoes what the call has passed.
                self.passed[group] -= report.when == "teardown" and report.failed

    def pytest_terminal_summary(self, terminalreporter):
        for group in GROUPS:
            passed, size = self.passed[group], self.size.get(group)
            if passed != size:
                verdict = f"not recorded: {passed} of {size or 'an unknown number of'} tests passed"
            elif files_hash(group) != self.before[group]:
                verdict = "not recorded: its files changed while its tests ran"
            else:
                record(group, self.before[group])
                verdict = "recorded"
            terminalreporter.write_line(f"{group!r} ({self.before[group]}): {verdict}")


def pytest_addoption(parser):
    parser.addoption(
        "--record",
        action="store_true",
        help="run unchanged tests as well and record which groups passed in tests/golden",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", f"{MARK}(group): runs only when the group has changed")
    if not config.getoption("record") or hasattr(config, "workerinput"):
        return
    if config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        raise pytest.UsageError("--record needs every test of a group: give no path beside it")
    config.pluginmanager.register(Recorder())


@pytest.hookimpl(tryfirst=True)  # before tests are deselected
def pytest_collection_modifyitems(config, items):
    group_of = {}
    for item in items:
        if marker := item.get_closest_marker(MARK):
            (group_of[item],) = marker.args
    size = Counter(group_of.values())
    unchanged = {group for group in size if not config.getoption("record") and is_unchanged(group)}
    for item, group in group_of.items():
        item.user_properties.append((MARK, (group, size[group])))
        if group in unchanged:
            passed = read()[group]["files"]
            reason = f"{group!r} passed with files {passed}; `make test_all` runs it"
            item.add_marker(pytest.mark.skip(reason=reason))


def main() -> int:
    changed = [group for group in GROUPS if not is_unchanged(group)]
    for group in changed:
        if read().get(group, {}).get("files") == files_hash(group):
            print(f"{group!r} is not recorded with {versions(group)}: its tests will run")
        else:
            print(f"{group!r} has changed: its tests will run")
    return 1 if any(GROUPS[group].compilers for group in changed) else 0


if __name__ == "__main__":
    sys.exit(main())
