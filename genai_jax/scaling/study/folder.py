"""Reads the folder of a study: its question, its flagfiles, and the counts of each run."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable
from typing import NamedTuple

import jax

from genai_jax.config import Config, ConfigError
from genai_jax.files import read_text
from genai_jax.tasks.protocol import Task, batch_rows
from genai_jax.training.flops import flops_of
from genai_jax.training.parameter_counts import parameter_counts

NOT_RUNS = ("base.flags", "study.flags")


class Counts(NamedTuple):
    """Counts of one model, or one member of a population, by its task."""

    parameters: int
    embedding_parameters: int  # input embeddings and position tables, not an untied head
    active: int  # parameters that a token uses: all but those of unchosen experts
    tokens_per_step: int  # examples for tasks without tokens
    flops_per_step: float
    convention: str  # how FLOPs are counted
    loss_unit: str

    @property
    def non_embedding(self) -> int:
        return self.parameters - self.embedding_parameters


class Run(NamedTuple):
    """A flagfile of the study."""

    name: str  # name of the flagfile without its extension
    flagfile: pathlib.Path
    workdir: pathlib.Path
    config: Config
    counts: Counts

    @property
    def steps(self) -> int:
        return self.config.train.steps

    @property
    def members(self) -> int:
        return self.config.population.size

    @property
    def flops(self) -> float:
        """FLOPs of the whole run, for all members."""
        return self.counts.flops_per_step * self.steps * self.members


class Study(NamedTuple):
    folder: pathlib.Path
    title: str
    question: str
    runs: list[Run]


def check_folder(folder: pathlib.Path):
    """Raises `ConfigError` if `folder` is not the folder of a study."""
    if not folder.is_dir():
        raise ConfigError(f"--study={folder}: no such folder")
    needed = {
        "README.md": "its heading and first paragraph are the question",
        "study.flags": "it sets --study.analysis=NAME and the flags of that analysis",
    }
    missing = [f"{name} ({what})" for name, what in needed.items() if not (folder / name).is_file()]
    if missing:
        raise ConfigError(f"--study={folder} is not a study yet: add {' and '.join(missing)}")
    if not flagfiles(folder):
        raise ConfigError(
            f"--study={folder} has no runs: it needs flagfiles besides {' and '.join(NOT_RUNS)}"
        )


def flagfiles(folder: pathlib.Path) -> list[pathlib.Path]:
    """The flagfiles of the runs."""
    paths = (path for path in folder.glob("*.flags") if path.name not in NOT_RUNS)
    return sorted(paths, key=lambda path: by_number(path.stem))


def by_number(name: str) -> list:
    """A sort key that puts width.8 before width.16."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", name))]


def read_study(
    folder: pathlib.Path,
    workdir: pathlib.Path,
    parse_run: Callable[[list[str]], Config],
    make_task: Callable[[Config], Task],
) -> Study:
    """Reads every flagfile and creates its task, which reports flags that contradict each other.

    Args:
      folder: folder of the study.
      workdir: workdir of the study; that of a run is ``runs/<name>`` in it.
      parse_run: command line -> configuration.
      make_task: configuration -> task.

    Raises:
      ConfigError: as `check_folder`; a mistake in a flagfile; two runs with the same workdir or the
        same flags.
    """
    check_folder(folder)
    paths = flagfiles(folder)
    runs = [_read_run(path, workdir / "runs" / path.stem, parse_run, make_task) for path in paths]
    _check_different(runs)
    title, question = _title_and_question(read_text(folder / "README.md"))
    return Study(folder, title or folder.name, question, runs)


def _read_run(path, workdir, parse_run, make_task) -> Run:
    try:
        own = parse_run([f"--flagfile={path}"]).run.workdir
        if own:
            raise ConfigError(f"sets --workdir={own}, but the study chooses the workdir: remove it")
        config = parse_run([f"--flagfile={path}", f"--workdir={workdir}"])
        # The attention backend that the run will use may not exist on this machine.
        task = make_task(config.replace("run", attention="auto"))
        return Run(path.stem, path, workdir, config, counts_of(task, config))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def counts_of(task: Task, config: Config) -> Counts:
    """Counts of a task from shapes; nothing is allocated."""
    params, _ = jax.eval_shape(lambda: task.init(jax.random.key(0)))
    flops = flops_of(task, config)
    sizes = parameter_counts(params, flops.get("inactive_parameters", 0))
    return Counts(
        parameters=sizes["total"],
        embedding_parameters=sizes["embedding"],
        active=sizes["active"],
        tokens_per_step=task.tokens_per_step() or batch_rows(task.data.batch_spec),
        flops_per_step=flops["flops_per_step"],
        convention=flops["convention"],
        loss_unit=task.loss_unit,
    )


def _check_different(runs: list[Run]):
    """Raises `ConfigError` for two runs with the same flags or the same workdir."""
    folders: dict[str, Run] = {}
    flags: dict[str, Run] = {}
    for run in runs:
        # Some file systems do not distinguish A from a.
        other = folders.setdefault(run.name.casefold(), run)
        if other is not run:
            raise ConfigError(
                f"{other.flagfile} and {run.flagfile} write to the same workdir on "
                "case-insensitive file systems: rename one"
            )
        other = flags.setdefault(run.config.to_flags(leave_out=("workdir",)), run)
        if other is not run:
            raise ConfigError(f"{other.flagfile} and {run.flagfile} are the same run: delete one")


def _title_and_question(readme: str) -> tuple[str, str]:
    """The first heading and the paragraph after it, without Markdown markup."""
    heading = re.search(r"^#\s*(.+)$", readme, re.MULTILINE)
    plain = lambda text: re.sub(r"[*_`]+", "", " ".join(text.split()))
    rest = readme[heading.end() :] if heading else readme
    parts = [part.strip() for part in rest.split("\n\n") if part.strip()]
    question = plain(parts[0]).removeprefix("Question. ") if parts else ""
    return plain(heading[1]) if heading else "", question
