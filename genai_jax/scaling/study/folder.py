"""Reads the folder of a study: a question, flagfiles, and what is known of a run before it ran."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable
from typing import NamedTuple

import jax

from genai_jax.config import Config, ConfigError
from genai_jax.tasks.protocol import Task, batch_rows
from genai_jax.training.flops import flops_of
from genai_jax.training.parameter_counts import parameter_counts

NOT_RUNS = ("base.flags", "study.flags")


class Counts(NamedTuple):
    """Of one model, as its task counts them: a member of a population counts alone."""

    parameters: int
    embedding_parameters: int  # of input embeddings and position tables; an untied head is no one
    active: int  # all but those of experts that a token does not choose; embeddings count
    tokens_per_step: int  # examples, where there are no tokens
    flops_per_step: float
    convention: str  # of the FLOPs
    loss_unit: str

    @property
    def non_embedding(self) -> int:
        return self.parameters - self.embedding_parameters


class Run(NamedTuple):
    """A flagfile of the study."""

    name: str  # of the flagfile, without its end
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
        """Of the whole run, all members."""
        return self.counts.flops_per_step * self.steps * self.members


class Study(NamedTuple):
    folder: pathlib.Path
    title: str
    question: str
    runs: list[Run]


def check_folder(folder: pathlib.Path):
    """Raises `ConfigError` if `folder` is no study."""
    if not folder.is_dir():
        raise ConfigError(f"--study={folder}: no such folder")
    for name, holds in (("README.md", "the question"), ("study.flags", "--study.analysis=...")):
        if not (folder / name).is_file():
            raise ConfigError(f"--study={folder} has no {name}, which holds {holds}")
    if not flagfiles(folder):
        raise ConfigError(
            f"--study={folder} holds no run: every flagfile there but "
            f"{' and '.join(NOT_RUNS)} is one"
        )


def flagfiles(folder: pathlib.Path) -> list[pathlib.Path]:
    """The flagfiles of the runs."""
    found = (path for path in folder.glob("*.flags") if path.name not in NOT_RUNS)
    return sorted(found, key=lambda path: by_number(path.stem))


def by_number(name: str) -> list:
    """A key that sorts width.8 before width.16."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", name))]


def read_study(
    folder: pathlib.Path,
    workdir: pathlib.Path,
    parse_run: Callable[[list[str]], Config],
    make_task: Callable[[Config], Task],
) -> Study:
    """Reads every flagfile and makes its task, which finds flags that contradict each other.

    Args:
      folder: of the study.
      workdir: of the study; a run's is ``runs/<name>`` in it.
      parse_run: command line -> configuration.
      make_task: configuration -> task.

    Raises:
      ConfigError: as `check_folder`; a mistake in a flagfile, which is named; two runs of the same
        workdir or of the same flags.
    """
    check_folder(folder)
    paths = flagfiles(folder)
    runs = [_read_run(path, workdir / "runs" / path.stem, parse_run, make_task) for path in paths]
    _check_different(runs)
    title, question = _title_and_question((folder / "README.md").read_text(encoding="utf-8"))
    return Study(folder, title or folder.name, question, runs)


def _read_run(path, workdir, parse_run, make_task) -> Run:
    try:
        own = parse_run([f"--flagfile={path}"]).run.workdir
        if own:
            raise ConfigError(f"sets --workdir={own}; where a run's files go is the study's to say")
        config = parse_run([f"--flagfile={path}", f"--workdir={workdir}"])
        # The backend of the accelerator that runs it need not be there where it is read.
        task = make_task(config.replace("run", attention="auto"))
        return Run(path.stem, path, workdir, config, counts_of(task, config))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def counts_of(task: Task, config: Config) -> Counts:
    """Shapes alone: nothing is allocated."""
    params, _ = jax.eval_shape(lambda: task.init(jax.random.key(0)))
    flops = flops_of(task)
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
    """Raises `ConfigError` for two runs that are one, or would write to the same folder."""
    folders: dict[str, Run] = {}
    flags: dict[str, Run] = {}
    for run in runs:
        # Some file systems take A and a for the same name.
        other = folders.setdefault(run.name.casefold(), run)
        if other is not run:
            raise ConfigError(
                f"{other.flagfile} and {run.flagfile} write to the same workdir where small and "
                "capital letters are one: rename one"
            )
        other = flags.setdefault(run.config.to_flags(leave_out=("workdir",)), run)
        if other is not run:
            raise ConfigError(f"{other.flagfile} and {run.flagfile} are the same run: delete one")


def _title_and_question(readme: str) -> tuple[str, str]:
    """The first heading, and the first paragraph behind it, without marks of Markdown."""
    heading = re.search(r"^#\s*(.+)$", readme, re.MULTILINE)
    plain = lambda text: re.sub(r"[*_`]+", "", " ".join(text.split()))
    rest = readme[heading.end() :] if heading else readme
    parts = [part.strip() for part in rest.split("\n\n") if part.strip()]
    question = plain(parts[0]).removeprefix("Question. ") if parts else ""
    return plain(heading[1]) if heading else "", question
