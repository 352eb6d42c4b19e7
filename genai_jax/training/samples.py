"""Samples while a run trains: files in ``samples/``, which the boards show as well."""

import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax

from genai_jax.config import ConfigError
from genai_jax.errors import NotFinite, printable
from genai_jax.files import reason_of
from genai_jax.tasks.protocol import Params, PyTree
from genai_jax.training.checkpoint import first_line
from genai_jax.training.execution import Execution
from genai_jax.training.metrics_log import MetricsLog
from genai_jax.training.step import TrainState

FOLDER = "samples"
Sampler = Callable[[Params, PyTree, int], Any]  # parameters, mutables, step -> a `Sampled`


class SampleWriter:
    """Samples from a state and writes what comes out; a problem with that does not end a run.

    Only where there are several processes does an unexpected error of sampling itself, such as too
    little memory in one of them: it raises, since the others would wait for that process.

    All processes have to make the same calls; the one with a log writes. Files are named by the
    step, so that a resumed run writes those of a repeated step again.

    Args:
      sampler: what is sampled; takes parameters with adapters merged in.
      execution: of the run.
      workdir: folder of the run.
      log: whose boards show the samples; None in processes that do not write.
    """

    def __init__(
        self, sampler: Sampler, execution: Execution, workdir: pathlib.Path, log: MetricsLog | None
    ):
        self._sampler, self._execution = sampler, execution
        self._folder, self._log = workdir / FOLDER, log
        self._warned: set[str] = set()

    def check(self, state: TrainState):
        """Samples and writes once, and drops the result: what cannot work is noticed at once.

        Raises:
          ConfigError: flags that contradict each other, data that are missing, or samples that
            cannot be written as files.
        """
        try:
            sampled = self._sample(0, state)
        except NotFinite:  # of a model that is not trained yet
            return
        if self._log:
            _try_to_write(sampled)

    def write(self, step: int, state: TrainState):
        """Writes samples of a step; a problem is a warning."""
        try:
            sampled = self._sample(step, state)
        except Exception as error:  # of the task, of the memory
            if jax.process_count() > 1 and not isinstance(error, ConfigError | OSError):
                raise
            self._problem(step, error)
            return
        if self._log:
            try:
                self._log.show(step, self._written(f"step_{step:08}", sampled))
            except Exception as error:  # of what draws and encodes, of the disk, of the memory
                self._problem(step, error)

    def _sample(self, step: int, state: TrainState) -> Any:
        return self._sampler(*self._execution.in_use(state), step)

    def _written(self, stem: str, sampled: Any) -> dict[str, pathlib.Path]:
        """Name on a board -> file."""
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"{stem}{sampled.suffix}"
        try:
            others = sampled.write(str(path), self._folder)
        except BaseException:
            path.unlink(missing_ok=True)  # a part of it
            raise
        files = [path, *(p for p in map(pathlib.Path, others) if p != path)]
        return {f"samples{p.stem.removeprefix(stem)}": p for p in files}

    def _problem(self, step: int, error: Exception):
        """Warns that a step has no samples, once for each kind of problem."""
        where, kind = f"no samples in {self._folder} at step {step}", _reason(error)
        text = f"{where}: {kind}"
        if isinstance(error, NotFinite):
            text, kind = f"no samples at step {step}: {error.what}", "not finite"
        elif not isinstance(error, OSError | ConfigError):
            kind = type(error).__name__
        if self._log and kind not in self._warned:
            print(f"warning: {text}", file=sys.stderr)
        self._warned.add(kind)


def _try_to_write(sampled: Any):
    """Writes samples to a temporary folder; what the disk is to blame for does not count.

    Raises:
      ConfigError: they cannot be drawn or encoded.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / f"samples{sampled.suffix}"
            sampled.write(str(path), path.parent)
    except Exception as error:  # of what draws and encodes
        if isinstance(error, OSError) and error.errno is not None:
            return
        raise ConfigError(
            f"samples cannot be written during training: {_reason(error)}; leave --sample.every 0"
        ) from error


def _reason(error: Exception) -> str:
    """Why there are no samples, in one line; with the type of an error that is not the user's."""
    if isinstance(error, OSError | ConfigError):
        return reason_of(error)
    name, line = type(error).__name__, printable(first_line(error))
    return name if line == name else f"{name}: {line}"
