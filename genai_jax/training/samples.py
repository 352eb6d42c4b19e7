"""Samples while a run trains: files in ``samples/``, which the boards show as well."""

import contextlib
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from genai_jax.config import ConfigError
from genai_jax.errors import NotFinite
from genai_jax.files import reason_of
from genai_jax.tasks.protocol import Params, PyTree
from genai_jax.training.execution import Execution
from genai_jax.training.metrics_log import MetricsLog
from genai_jax.training.step import TrainState

FOLDER = "samples"
Sampler = Callable[[Params, PyTree, int], Any]  # parameters, mutables, step -> a `Sampled`


class SampleWriter:
    """Samples from a state and writes what comes out; a run never ends because of it.

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
        """Samples once and drops the result, so that what cannot be sampled is noticed at once.

        Raises:
          ConfigError: flags that contradict each other, or data that are missing.
        """
        with contextlib.suppress(NotFinite):  # of a model that is not trained yet
            self._sample(0, state)

    def write(self, step: int, state: TrainState):
        """Writes samples of a step; a problem is a warning."""
        try:
            sampled = self._sample(step, state)
            if self._log:
                self._log.show(step, self._written(f"step_{step:08}", sampled))
        except NotFinite as error:
            self._warn(f"no samples at step {step}: {error.what}", "not finite")
        except (OSError, ConfigError) as error:
            reason = reason_of(error)
            self._warn(f"no samples in {self._folder} at step {step}: {reason}", reason)

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

    def _warn(self, text: str, kind: str):
        """Prints a warning, one of each kind."""
        if self._log and kind not in self._warned:
            print(f"warning: {text}", file=sys.stderr)
        self._warned.add(kind)
