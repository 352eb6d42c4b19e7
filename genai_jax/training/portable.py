"""What a run keeps in its workdir of the data and of other runs, so that it can be moved.

`sample` and `evaluate` read ``WORKDIR/data`` instead of what the flags of the run name, unless
their own command line names another place.
"""

import dataclasses
import pathlib
import shutil
from collections.abc import Mapping

from genai_jax.config import Config
from genai_jax.data.kept import RECORD
from genai_jax.files import writing_to
from genai_jax.tasks.protocol import Keeps, Task

FOLDER = "data"
RUNS = "runs"  # flag -> the files that describe the run it names
DESCRIBING = ("flags.txt", "run.json")


def keep(task: Task, config: Config, record: dict):
    """Copies to the workdir what a run needs besides its checkpoints.

    Args:
      task: of the run.
      config: of the run.
      record: what run.json says of the data.

    Raises:
      ConfigError: it cannot be written.
    """
    folder = pathlib.Path(config.run.workdir) / FOLDER
    with writing_to(folder):
        for flag in sorted(config.names_run()):
            if workdir := config.items()[flag]:
                _keep_run(pathlib.Path(workdir), folder / RUNS / flag)
        if isinstance(task.data, Keeps):
            task.data.keep(folder, record)


def _keep_run(workdir: pathlib.Path, target: pathlib.Path):
    """Copies what describes a run that another one builds on, and the runs that it builds on.

    The parameters are part of the checkpoints. A run that is gone was copied before.
    """
    if not (workdir / DESCRIBING[0]).exists() or workdir.resolve() == target.resolve():
        return
    target.mkdir(parents=True, exist_ok=True)
    for name in DESCRIBING:
        if (workdir / name).exists():
            shutil.copyfile(workdir / name, target / name)
    tokenizers = workdir.glob(f"{FOLDER}/tokenizer.*")
    for path in (workdir / FOLDER / RECORD, *tokenizers):
        if path.exists():
            (target / FOLDER).mkdir(exist_ok=True)
            shutil.copyfile(path, target / FOLDER / path.name)
    if (workdir / FOLDER / RUNS).is_dir():
        shutil.copytree(workdir / FOLDER / RUNS, target / FOLDER / RUNS, dirs_exist_ok=True)


def with_kept(config: Config) -> Config:
    """The configuration of a run that is read, with the places of what it kept."""
    folder = pathlib.Path(config.run.workdir) / FOLDER
    kept = {path.name: str(path) for path in (folder / RUNS).glob("*")}
    for path in sorted(folder.glob("tokenizer.*")):
        kept["data.tokenizer"] = str(path)
    if (folder / RECORD).exists():
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
