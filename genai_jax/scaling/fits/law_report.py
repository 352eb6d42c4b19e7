"""A report on scaling laws that predicts runs, for Python."""

from __future__ import annotations

import dataclasses

from genai_jax.scaling.fits.all_laws import Fits
from genai_jax.scaling.fits.optimum import Estimate, Optimum, optimum
from genai_jax.scaling.reported import Report


@dataclasses.dataclass(frozen=True, repr=False)
class ScalingLaw(Report):
    """A report on scaling laws, with the laws themselves.

    Attributes:
      fits: all laws; `fits.parametric` is L = E + A / N^alpha + B / D^beta.
      head: the line above the report.
    """

    fits: Fits = dataclasses.field(kw_only=True)
    head: str = dataclasses.field(kw_only=True)

    def predict(self, parameters: float, tokens: float) -> Estimate:
        """The loss of a run by the parametric law, with the 95% interval of the law.

        The interval is that of the bootstrap; it does not include the scatter of single runs.
        """
        law = self.fits.parametric
        samples = law.sampled_losses(parameters, tokens)[:, 0]
        return Estimate.of(law.loss(parameters, tokens)[0], samples)

    def optimum(self, flops: float) -> Optimum:
        """The compute-optimal parameters and tokens for a budget, and their loss, with intervals.

        Raises:
          ConfigError: the fitted law has no optimum.
        """
        return optimum(self.fits.parametric, self.fits.cost, flops)

    def __str__(self) -> str:
        return f"{self.head}\n\n{super().__str__()}"
