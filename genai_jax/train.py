"""Trains or resumes a run: python -m genai_jax.train --flagfile=F --workdir=D [--flag=value]

In Python, `genai_jax.train(flags, workdir)` does the same: the module is callable.
"""

from collections.abc import Sequence
from typing import Any

from genai_jax.callable_commands import callable_as
from genai_jax.command import run
from genai_jax.components import parse_run, run_help
from genai_jax.config import ConfigError, asks_for_help


def main(argv: Sequence[str]) -> int:
    if asks_for_help(argv):
        print(run_help(argv, __doc__))
        return 0
    config = parse_run(argv)
    if not config.run.workdir:
        raise ConfigError("--workdir is not set: name a folder for the run's files")
    from genai_jax.trainer import run_training

    return run_training(config)


def train(flags: Any, workdir: Any) -> Any:
    """See `genai_jax.runs.train`."""
    from genai_jax.runs import train

    return train(flags, workdir)


callable_as(train)

if __name__ == "__main__":
    run(main)
