"""Trains or resumes a run: python -m genai_jax.train --flagfile=F --workdir=D [--flag=value]"""

import sys
from collections.abc import Sequence

from genai_jax.command import run
from genai_jax.components import make_task, parse_run, run_help
from genai_jax.config import ConfigError, asks_for_help


def main(argv: Sequence[str]) -> int:
    if asks_for_help(argv):
        print(run_help(argv, __doc__))
        return 0
    config = parse_run(argv)
    if not config.run.workdir:
        raise ConfigError("--workdir is not set: name a folder for the run's files")
    from genai_jax.training.distributed import is_main, join_processes
    from genai_jax.training.lock import locked
    from genai_jax.training.loop import train
    from genai_jax.training.schedule_notes import cut_schedules
    from genai_jax.training.sharding import make_mesh
    from genai_jax.training.workdir import check_path, claim

    with join_processes(config.distributed):
        make_mesh(config.mesh)  # one that cannot work is refused before the data are opened
        if not is_main():
            return train(make_task(config), config)
        check_path(config.run.workdir)
        with locked(config.run.workdir, "run"):
            task = make_task(config)  # opens the data, which may take a download
            for change in claim(config):
                print(f"changed since the run began: {change}", file=sys.stderr)
            for note in cut_schedules(config):
                print(f"note: {note}", file=sys.stderr)
            return train(task, config)


if __name__ == "__main__":
    run(main)
