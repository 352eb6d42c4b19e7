"""What a step reports, read on the host: which numbers are new, and whether the run can go on."""

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from genai_jax.tasks.protocol import Phase
from genai_jax.training.step import StepReport, phase_ran


class CannotGoOn(Exception):
    """A step after which a run cannot go on.

    Attributes:
      what: for the error message.
      loss_failed: whether the parameters before the step are already bad.
    """

    def __init__(self, what: str, loss_failed: bool):
        super().__init__(what)
        self.what, self.loss_failed = what, loss_failed


class ReportReader:
    """Reads the reports of steps.

    Args:
      phases: of the run.
      numbers: metrics on the host, perhaps of several members -> single numbers.
      rate: completed steps -> learning rate of the next one, or those of several members.

    Attributes:
      rare: the metrics of phases that do not run in every step, as last seen.
    """

    def __init__(
        self,
        phases: Sequence[Phase],
        numbers: Callable[[Mapping], dict[str, float]],
        rate: Callable[[int], np.ndarray],
    ):
        self._phases, self._numbers, self._rate = tuple(phases), numbers, rate
        self._lazy = tuple(f"{phase.name}/" for phase in phases if phase.every > 1)
        self.rare: dict[str, float] = {}

    def read(self, step: int, report: StepReport) -> dict[str, float]:
        """The metrics of step `step` (counted from 1), those of phases that did not run as before.

        Raises:
          CannotGoOn: a loss or a gradient is not finite, or a phase has nothing left to learn.
        """
        report = jax.device_get(report)
        ran = {n: x for n, x in report.metrics.items() if phase_ran(self._phases, n, step - 1)}
        metrics = self._numbers({"learning_rate": self._rate(step - 1)} | ran)
        self._check(step, metrics, report.can_learn)
        self.rare |= {name: x for name, x in metrics.items() if name.startswith(self._lazy)}
        return metrics | self.rare

    def _check(self, step: int, metrics: Mapping[str, float], can_learn: Mapping[str, np.ndarray]):
        several = len(self._phases) > 1
        # Losses first: they tell about the parameters before the step.
        for kind in ("loss", "grad_norm"):
            for phase in self._phases:
                value = metrics.get(f"{phase.name}/{kind}" if several else kind)
                if value is not None and not math.isfinite(value):
                    where = f" in phase {phase.name}" if several else ""
                    what = f"{kind} is {value} at step {step}{where}"
                    raise CannotGoOn(what, kind == "loss")
        for phase in self._phases:
            if not np.any(can_learn[phase.name]):
                raise CannotGoOn(f"{phase.stuck} at step {step} in phase {phase.name}", True)


def last_good(steps: list[int], failed: int, loss_failed: bool) -> int | None:
    """The newest of the saved `steps` that is known to be sound when step `failed` is not.

    The loss of a step is that of the parameters saved at the step before, which are then bad too.
    """
    good = [step for step in steps if step < failed - loss_failed]
    return good[-1] if good else None
