"""Saving a run's checkpoints: whatever goes wrong is one line that names what is kept."""

import os
import pathlib
import re
import sys

from genai_jax.config import ConfigError
from genai_jax.files import writing_to
from genai_jax.training.checkpoint import Checkpointer, first_line
from genai_jax.training.ema_profiles import FOLDER, write_snapshot


class Saver:
    """Saves in the background into the workdir of a run."""

    def __init__(self, checkpointer: Checkpointer, workdir: pathlib.Path):
        self._checkpointer, self._workdir = checkpointer, workdir
        self._failed = False  # closing raises the error of the last save again
        self._problem: ConfigError | None = None  # of writing averages

    def save(self, *arguments):
        """Starts to save; the arguments are those of `Checkpointer.save`.

        Raises:
          ConfigError: this checkpoint or the one before it could not be written.
        """
        self._try(self._checkpointer.save, *arguments)

    def snapshot(self, step: int, ema: dict) -> bool:
        """Writes averages of a step into the workdir; returns whether that worked, see `check`."""
        try:
            with writing_to(self._workdir / FOLDER):
                write_snapshot(self._workdir, step, ema)
        except ConfigError as error:
            self._problem = self._problem or error
        return self._problem is None

    def check(self):
        """Raises `ConfigError`, which says what is kept, if averages could not be written."""
        if self._problem:
            raise ConfigError(f"{self._problem}; {self.kept()}")

    def wait(self):
        """Blocks until the last checkpoint is on disk.

        Raises:
          ConfigError: it could not be written.
        """
        self._try(self._checkpointer.wait)

    def close(self):
        failed = self._failed
        try:
            self._try(self._checkpointer.close)
        except ConfigError as error:
            if not failed:
                print(f"warning: {error}", file=sys.stderr)

    def kept(self) -> str:
        """What a resumed run would start from."""
        steps = self._checkpointer.steps()
        return f"step {steps[-1]} is the last one saved" if steps else "nothing is saved"

    def _try(self, function, *arguments):
        try:
            function(*arguments)
        except Exception as error:  # orbax and tensorstore raise many types for a failed save
            self._failed = True
            raise ConfigError(
                f"cannot save a checkpoint in {self._workdir}: {_reason(error)}; {self.kept()}"
            ) from None


def _reason(error: Exception) -> str:
    """One line, with what the operating system calls a number that the line has instead."""
    line = first_line(error)
    number = re.search(r"os_error_code='(\d+)'", line)
    said = os.strerror(int(number[1])) if number else ""
    return line if said in line else f"{said}: {line}"
