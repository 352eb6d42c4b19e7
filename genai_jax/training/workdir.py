"""The files that describe a run: ``flags.txt`` and ``run.json``."""

import datetime
import json
import os
import pathlib
import platform
import subprocess
from importlib import metadata
from typing import Any

import jax
from jax.sharding import Mesh

from genai_jax.config import Config, ConfigError
from genai_jax.tasks.protocol import Params, Task
from genai_jax.training.parameter_counts import parameter_counts

VERSIONS = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def claim(config: Config) -> list[str]:
    """Creates the workdir of a run, or checks that it belongs to the same configuration.

    Returns:
      The changes to flags since the run began; only changeable flags can be among them.

    Raises:
      ConfigError: it belongs to a run with other flags (which are named), or is not writable.
    """
    workdir = pathlib.Path(config.run.workdir)
    path = workdir / "flags.txt"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"cannot write to --workdir={workdir}: {error.strerror}") from None
    # The number of processes and the index of this one are not part of the run.
    placement = [name for name in config.items() if name.startswith("distributed.")]
    changes = []
    saved = has_checkpoints(workdir)
    if path.exists() and saved:
        old, new = _flag_texts(path.read_text()), _flag_texts(config.to_flags())
        own = ("workdir", *placement)
        names = [n for n in old | new if n not in own and old.get(n) != new.get(n)]
        changes = [f"--{n}={old.get(n, '(unset)')} -> {new.get(n, '(unset)')}" for n in names]
        fixed = [c for n, c in zip(names, changes, strict=True) if n not in config.changeable()]
        if fixed:
            raise ConfigError(
                f"--workdir={workdir} holds a run with different flags: {', '.join(fixed)}; use "
                "the same flags or another workdir"
            )
    elif saved:
        raise ConfigError(
            f"--workdir={workdir} holds checkpoints but no flags.txt to check against"
        )
    write_atomically(path, config.to_flags(leave_out=("workdir", *placement)))
    return changes


def has_checkpoints(workdir: pathlib.Path) -> bool:
    """Whether there is a checkpoint to protect; a run without one may start over."""
    folder = workdir / "checkpoints"
    return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())


def flags_path(workdir: str | pathlib.Path, flag: str = "--workdir") -> pathlib.Path:
    """The file with the flags of an existing run.

    Raises:
      ConfigError: there is no run in `workdir`.
    """
    path = pathlib.Path(workdir) / "flags.txt"
    if not path.exists():
        raise ConfigError(f"no run in {flag}={workdir}: it has no flags.txt")
    return path


def write_record(workdir: pathlib.Path, record: dict):
    """Writes ``run.json``.

    Raises:
      ConfigError: the data or the tokenizer differ from those that the run began with.
    """
    old = read_record(workdir) if has_checkpoints(workdir) else {}
    for name, value in record["data"].items():
        before = old.get("data", {}).get(name, value)
        if before != value:
            raise ConfigError(
                f"the data changed since the run in --workdir={workdir} began: "
                f"{name} was {before} and is now {value}"
            )
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record = {"began": old.get("began", now), "last_started": now, **record}
    write_atomically(workdir / "run.json", json.dumps(record, indent=2) + "\n")


def _flag_texts(flagfile: str) -> dict[str, str]:
    """Flag name -> value as text, from a file that `Config.to_flags` wrote."""
    return dict(line.removeprefix("--").split("=", 1) for line in flagfile.splitlines())


def read_record(workdir: str | pathlib.Path) -> dict:
    """``run.json`` of a run, empty if there is none."""
    path = pathlib.Path(workdir) / "run.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write_atomically(path: pathlib.Path, text: str):
    """Writes a file completely or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def environment() -> dict:
    """Versions, git commit and devices."""
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in VERSIONS},
        "git_commit": _git_commit(),
        "platform": devices[0].platform,
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
        "processes": jax.process_count(),
    }


def run_record(task: Task, mesh: Mesh, params: Params, flops: dict, peak: Any) -> dict:
    """The contents of run.json; `params` are those of a single model, or their shapes."""
    return {
        **environment(),
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "data": task.data.record(),
        "parameters": parameter_counts(params, flops.get("inactive_parameters", 0)),
        **flops,
        "peak": peak._asdict() if peak else None,
        "mfu": "flops_per_step / step_time_s / peak.flops_per_second",
    }


def _git_commit() -> str | None:
    here = pathlib.Path(__file__).parent

    def git(*arguments):
        return subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
