"""Shell commands that train the runs on other machines."""

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
    """A shell command for each run.

    Args:
      launcher: "print" for the training command itself, "slurm" for a job submitted by slurm.sh.
      options: more options for slurm.sh, e.g. "--nodes=1 --gpus_per_node=1 --partition=gpu".
      runs: the runs to train.

    Raises:
      ConfigError: "slurm" and a study outside the repository, from which the jobs read their
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
            f"{run.flagfile} is not in {ROOT}, where jobs of --launcher=slurm read their flagfiles"
        ) from None
    flags = [f"--flagfile={flagfile}", f"--workdir={run.workdir.resolve()}"]
    return shlex.join([str(SLURM), *(shlex.split(options) or ["--nodes=1"]), *flags])
