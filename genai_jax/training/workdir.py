"""The files that describe a run: ``flags.txt`` and ``run.json``."""

import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys
from importlib import metadata
from typing import Any

import jax
from jax.sharding import Mesh

from genai_jax import __version__
from genai_jax.config import Config, ConfigError
from genai_jax.files import (
    expand_home,
    read_object,
    read_text,
    reason_of,
    unreadable,
    write_text,
    writing_to,
)
from genai_jax.flagfiles import flag_values
from genai_jax.standard_streams import message_stream
from genai_jax.tasks.protocol import Data, Params, Task
from genai_jax.training.parameter_counts import parameter_counts

PATTERN = "[]*?\\"  # orbax reads these as a pattern, and tensorstore the last as a slash
# What may change with --resume_with_changes, besides the data: no shape depends on it.
ON_REQUEST = tuple(
    f"optimizer.{name}"
    for name in (
        "learning_rate", "schedule", "warmup_steps", "decay_fraction", "final_fraction",
        "weight_decay",
    )
)  # fmt: skip
VERSIONS = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def claim(config: Config) -> list[str]:
    """Creates the workdir of a run, or checks that it belongs to the same configuration.

    Returns:
      The changes to flags since the run began; only changeable flags can be among them, and with
      ``--resume_with_changes`` those of the learning rate and the data.

    Raises:
      ConfigError: it belongs to a run with other flags (which are named), is not writable, or has a
        path that checkpoints cannot have.
    """
    workdir = pathlib.Path(config.run.workdir)
    path = workdir / "flags.txt"
    with writing_to(f"--workdir={workdir}"):
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / ".writable"
        probe.touch()
        probe.unlink()
    # The number of processes and the index of this one are not part of the run.
    placement = [name for name in config.items() if name.startswith("distributed.")]
    placement.append("code")  # only a command line allows code
    changes = []
    saved = has_checkpoints(workdir)
    if saved and os.path.lexists(path):
        new = flag_values(config.to_flags())
        # Flags written before paths were expanded may begin with ~.
        old = {n: new.get(n) if expand_home(v) == new.get(n) else v
               for n, v in recorded_flags(workdir).items()}  # fmt: skip
        own = ("workdir", "resume_with_changes", *placement)
        names = [n for n in old | new if n not in own and old.get(n) != new.get(n)]
        said = {n: f"--{n}={old.get(n, '(unset)')} -> {new.get(n, '(unset)')}" for n in names}
        changes, free = list(said.values()), config.changeable()
        fixed = [line for name, line in said.items() if name not in free]
        asked = [said[n] for n in names if n not in free and _may_change(n, config)]
        trained = max(saved_steps(workdir))
        if config.train.steps < trained:
            raise ConfigError(
                f"--workdir={workdir} holds a run that is trained to step {trained} already, more "
                f"than --train.steps={config.train.steps}"
            )
        allowed = config.run.resume_with_changes
        if fixed and not (allowed and asked == fixed):
            raise _other_flags(workdir, fixed if not allowed else [*{*fixed} - {*asked}], asked)
        if asked:
            _record_changes(workdir, trained, asked)
    elif saved:
        raise ConfigError(
            f"--workdir={workdir} holds checkpoints but no flags.txt to check against"
        )
    with writing_to(path):
        write_text(path, config.to_flags(leave_out=("workdir", *placement)))
    return changes


def _may_change(name: str, config: Config) -> bool:
    """Whether a flag is one that --resume_with_changes lets differ."""
    return "optimizer" in config.components and (name in ON_REQUEST or name.startswith("data."))


def _other_flags(workdir: pathlib.Path, fixed: list[str], asked: list[str]) -> ConfigError:
    advice = "the same flags or another workdir"
    if fixed == asked:
        advice = "the same flags, another workdir, or --resume_with_changes"
    return ConfigError(
        f"--workdir={workdir} holds a run with different flags: {', '.join(fixed)}; use {advice}"
    )


def _record_changes(workdir: pathlib.Path, step: int, changes: list[str]):
    """Adds to run.json what is different from checkpoint `step` on."""
    record = read_record(workdir, without="earlier changes are unknown")
    record["changes"] = [*record.get("changes", []), {"step": step, "flags": changes}]
    with writing_to(path := workdir / "run.json"):
        write_text(path, json.dumps(record, indent=2) + "\n")


def data_flags(config: Config) -> dict[str, str]:
    """The flags, as text, that decide which batches a run takes."""
    free = config.changeable()
    flags = flag_values(config.to_flags())
    return {n: v for n, v in flags.items() if n.startswith("data.") and n not in free}


def check_path(workdir: str | pathlib.Path):
    """Raises `ConfigError` for a path that the library of the checkpoints would misread."""
    path = str(pathlib.Path(workdir).absolute())
    for character in PATTERN:
        if character in path:
            raise ConfigError(
                f"--workdir={workdir}: checkpoints cannot be read from a path with {character!r}; "
                f"choose a path without {' '.join(PATTERN)}"
            )
    try:
        path.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"--workdir={str(workdir)!a}: checkpoints need a path that is valid UTF-8"
        ) from None


def has_checkpoints(workdir: pathlib.Path) -> bool:
    """Whether there is a checkpoint to protect; a run without one may start over."""
    return bool(saved_steps(workdir))


def saved_steps(workdir: pathlib.Path) -> list[int]:
    folder = workdir / "checkpoints"
    try:
        return [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise unreadable(folder, reason_of(error)) from None


def flags_path(workdir: str | pathlib.Path, flag: str = "--workdir") -> pathlib.Path:
    """The file with the flags of an existing run.

    Raises:
      ConfigError: there is no run in `workdir`.
    """
    path = pathlib.Path(workdir) / "flags.txt"
    if not os.path.lexists(path):
        raise ConfigError(f"no run in {flag}={workdir}: it has no flags.txt")
    return path


def recorded_flags(workdir: str | pathlib.Path) -> dict[str, str]:
    """Flag name -> value as text, of the run in `workdir`.

    Raises:
      ConfigError: flags.txt cannot be read, or is not what a run writes.
    """
    path = pathlib.Path(workdir) / "flags.txt"
    try:
        return flag_values(read_text(path))
    except ConfigError as error:
        raise error if str(path) in str(error) else unreadable(path, str(error)) from None


def write_record(workdir: pathlib.Path, record: dict, changed: Data | None = None):
    """Writes ``run.json``.

    Args:
      workdir: folder of the run.
      record: see `run_record`.
      changed: the data, if they need not be those that the run began with, but only fit it.

    Raises:
      ConfigError: the data or the tokenizer differ from those that the run began with, or its
        run.json cannot be read.
    """
    old = _record(workdir) if has_checkpoints(workdir) else {}
    other = {
        name: (before, value)
        for name, value in record["data"].items()
        if (before := old.get("data", {}).get(name, value)) != value
    }
    if other and not changed:
        name, (before, value) = next(iter(other.items()))
        raise ConfigError(
            f"the data changed since the run in --workdir={workdir} began: {name} was {before} and "
            f"is now {value}; --resume_with_changes goes on with other data"
        )
    if other:
        changed.check(old["data"])
    if other and "dataset" not in other:  # else the flag has said so
        lines = [f"{name}: {before} -> {value}" for name, (before, value) in other.items()]
        print(f"changed since the run began: {'; '.join(lines)}", file=message_stream())
        change = {"step": max(saved_steps(workdir)), "data": lines}
        old["changes"] = [*old.get("changes", []), change]
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record = {"began": old.get("began", now), "last_started": now, **record}
    if "changes" in old:
        record["changes"] = old["changes"]
    with writing_to(path := workdir / "run.json"):
        write_text(path, json.dumps(record, indent=2) + "\n")


def read_record(
    workdir: str | pathlib.Path,
    *,
    without: str = "the data are not checked against those of the run",
) -> dict:
    """``run.json`` of a run; empty, with a warning, if it is missing or cannot be read.

    Args:
      workdir: folder of the run.
      without: what the warning says that happens without it.
    """
    try:
        record = _record(workdir)
        problem = "" if record else f"there is no {pathlib.Path(workdir) / 'run.json'}"
    except ConfigError as error:
        record, problem = {}, str(error)
    if problem:
        print(f"warning: {problem}; {without}", file=sys.stderr)
    return record


def _record(workdir: str | pathlib.Path) -> dict:
    """``run.json`` of a run; empty if there is none.

    Raises:
      ConfigError: it cannot be read, or is not what a run writes.
    """
    path = pathlib.Path(workdir) / "run.json"
    if not os.path.lexists(path):
        return {}
    record = read_object(path)
    data = record.get("data")
    hashes = {n: v for n, v in data.items() if "sha256" in n} if isinstance(data, dict) else {"": 0}
    if hashes.get("validation_sha256", "") is None:  # of a single document, none is held out
        del hashes["validation_sha256"]
    if not all(isinstance(value, str) for value in hashes.values()):
        raise unreadable(path, "its `data` is not the record of a run's data")
    return record


def environment() -> dict:
    """Versions, git commit and devices."""
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "versions": {"genai_jax": __version__}
        | {name: metadata.version(name) for name in VERSIONS},
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
