"""The commands that train runs elsewhere, to be read or piped into a shell."""

from __future__ import annotations

import pathlib
import shlex
from collections.abc import Sequence

from genai_jax.config import ConfigError
from genai_jax.scaling.study.folder import Run
from genai_jax.scaling.study.runs import command

ROOT = pathlib.Path(__file__).parents[3]
SLURM = pathlib.Path("experiments/pods/launch/slurm.sh")


def commands(launcher: str, options: str, runs: Sequence[Run]) -> list[str]:
    """A line of shell for each run.

    Args:
      launcher: "print", the command of a process; or "slurm", one job a run by slurm.sh.
      options: further ones of slurm.sh, e.g. "--nodes=1 --gpus_per_node=1 --partition=gpu".
      runs: what is to be trained.

    Raises:
      ConfigError: a study outside the repository, from which the jobs of slurm.sh read their
        flagfiles.
    """
    if launcher == "slurm":
        return [_slurm(options, run) for run in runs]
    return [shlex.join(command(run)) for run in runs]


def _slurm(options: str, run: Run) -> str:
    try:
        flagfile = run.flagfile.resolve().relative_to(ROOT)
    except ValueError:
        raise ConfigError(
            f"{run.flagfile} is not in {ROOT}: jobs of --launcher=slurm read flagfiles from there"
        ) from None
    flags = [f"--flagfile={flagfile}", f"--workdir={run.workdir.resolve()}"]
    return shlex.join([str(SLURM), *(shlex.split(options) or ["--nodes=1"]), *flags])
