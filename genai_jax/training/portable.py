"""What a run keeps in its workdir of the data and of other runs, so that it can be moved.

`sample` and `evaluate` read ``WORKDIR/data`` instead of what the flags of the run name, unless
their own command line names another place.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping

from genai_jax.config import Config
from genai_jax.data.kept import RECORD, SUFFIXES, VOCABULARY
from genai_jax.files import MIB, read_bytes, write_bytes, writing_to
from genai_jax.tasks.protocol import Keeps, Task
from genai_jax.training.workdir import has_checkpoints

FOLDER = "data"
RUNS = "runs"  # flag -> the files that describe the run it names
DESCRIBING = ("flags.txt", "run.json", f"{FOLDER}/{RECORD}")
MOST_DEEP = 4  # runs that build on runs that build on runs
LARGEST = 64 * MIB  # of a file that describes a run


def keep(task: Task, config: Config, record: dict):
    """Copies to the workdir what a run needs besides its checkpoints.

    Args:
      task: of the run.
      config: of the run.
      record: what run.json says of the data.

    Raises:
      ConfigError: it cannot be written.
    """
    workdir = pathlib.Path(config.run.workdir)
    folder = workdir / FOLDER
    with writing_to(folder):
        # Later, the parameters of the other runs are those of the checkpoints.
        if not has_checkpoints(workdir):
            _keep_runs(config, folder)
        if isinstance(task.data, Keeps):
            task.data.keep(folder, record)


def _keep_runs(config: Config, folder: pathlib.Path):
    """Copies what describes the runs that this one builds on, and those that they build on."""
    for flag in sorted(config.names_run()):
        if other := config.items()[flag]:
            for path in _describing(pathlib.Path(other), MOST_DEEP):
                target = folder / RUNS / flag / path.relative_to(other)
                data = read_bytes(path, limit=LARGEST)
                target.parent.mkdir(parents=True, exist_ok=True)
                write_bytes(target, data)


def _describing(workdir: pathlib.Path, depth: int) -> Iterator[pathlib.Path]:
    """The files, not links, that describe a run and what it kept of others."""
    names = (*DESCRIBING, *(f"{FOLDER}/tokenizer{suffix}" for suffix in SUFFIXES))
    yield from (path for name in names if _is_file(path := workdir / name))
    runs = workdir / FOLDER / RUNS
    if depth and runs.is_dir() and not runs.is_symlink():
        for entry in sorted(os.scandir(runs), key=lambda entry: entry.name)[:MOST_DEEP]:
            if entry.is_dir(follow_symlinks=False):
                yield from _describing(pathlib.Path(entry.path), depth - 1)


def _is_file(path: pathlib.Path) -> bool:
    return path.is_file() and not path.is_symlink()


def with_kept(config: Config) -> Config:
    """The configuration of a run that is read, with the places of what it kept."""
    folder, kept = pathlib.Path(config.run.workdir) / FOLDER, {}
    values = config.items()
    for flag in config.names_run():
        if values[flag] and _is_file(folder / RUNS / flag / DESCRIBING[0]):
            kept[flag] = str(folder / RUNS / flag)
    tokenizer = folder / f"tokenizer{os.path.splitext(values.get('data.tokenizer') or '')[1]}"
    if tokenizer.suffix in SUFFIXES and _is_file(tokenizer):
        kept["data.tokenizer"] = str(tokenizer)
    if _is_file(folder / VOCABULARY):  # which goes with any data set
        kept["data.vocabulary"] = str(folder / VOCABULARY)
    if _is_file(folder / RECORD):
        kept["data.dataset"] = str(folder)
    return dataclasses.replace(config, kept=kept)


def without_kept(config: Config, moved: Mapping[str, object]) -> Config:
    """The configuration without the kept copies of what flags of the data name elsewhere."""
    gone = {f"data.{name}" for name in moved}
    if moved.keys() - {"tokenizer"}:
        gone.add("data.dataset")
    return dataclasses.replace(
        config, kept={name: path for name, path in config.kept.items() if name not in gone}
    )
