"""Fits a law of the loss to runs, with bootstrap intervals."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from genai_jax.config import ConfigError
from genai_jax.scaling.fits.bootstrap import interval, resampled
from genai_jax.scaling.fits.laws import Law
from genai_jax.scaling.fits.minimize import Minima, minimize
from genai_jax.scaling.fits.points import Points, check_enough, check_spread

DELTA = 1e-3  # of the Huber loss, applied to log loss (Hoffmann et al. 2022, equation 3)
CHUNK = 25_000  # numbers per array, few enough for the cache
ROUGH, FINE = 1e-6, 1e-12  # relative improvements at which a minimization stops
NEARLY, MINIMA = 1.5, 4  # resamples start at up to 4 fits within 1.5 times the best objective
FINISHED = 64  # number of the best rough fits that are refined


class Fit(NamedTuple):
    """A fitted law.

    Attributes:
      law: the law.
      x: [variables] of the law, relative to N = D = 1.
      samples: [resamples, variables], fitted to resampled points.
      objective: the sum of Huber losses.
      starts: number of starting points, and how many of them ended within 0.1% of the best
        objective.
      converged: whether the best fit and those of all resamples converged.
    """

    law: Law
    x: np.ndarray
    samples: np.ndarray
    objective: float
    starts: tuple[int, int]
    converged: bool

    @property
    def values(self) -> dict[str, float]:
        """Coefficient name -> value."""
        return dict(zip(self.law.coefficients, self.law.values(self.x).tolist(), strict=True))

    def intervals(self, level: float = 0.95) -> dict[str, tuple[float, float]]:
        """Coefficient name -> percentile interval."""
        low, high = interval(self.law.values(self.samples), level)
        return dict(zip(self.law.coefficients, zip(low, high, strict=True), strict=True))

    def loss(self, parameters, tokens) -> np.ndarray:
        """Predicted loss [points] of runs, for arrays or numbers that broadcast to [points]."""
        return self._losses(self.x[None], parameters, tokens)[0]

    def sampled_losses(self, parameters, tokens) -> np.ndarray:
        """Losses [resamples, points] predicted by the law of each resample."""
        return self._losses(self.samples, parameters, tokens)

    def _losses(self, x, parameters, tokens):
        sizes = np.broadcast_arrays(np.atleast_1d(parameters), np.atleast_1d(tokens))
        log_loss, _ = self.law.predict(x, *(np.log(np.asarray(s, np.float64)) for s in sizes))
        return np.exp(log_loss)


def fit(
    law: Law,
    points: Points,
    *,
    starts: np.ndarray | None = None,
    resamples: int = 0,
    seed: int = 0,
) -> Fit:
    """Minimizes the sum over points of the Huber loss of log-loss residuals, from many starts.

    Fits to resampled points start at the best fit, and at others that are nearly as good.

    Args:
      law: the law to fit.
      points: the runs.
      starts: [starts, variables] of the law, relative to N = D = 1; its own grid if not given.
      resamples: number of bootstrap resamples of the points, for intervals.
      seed: random seed for the bootstrap.

    Raises:
      ConfigError: fewer points than coefficients, or fewer than three sizes.
    """
    count = len(points.loss)
    check_enough(count, len(law.coefficients), f"the law {law.title}")
    check_spread(points)
    middle = np.mean(np.log(points.parameters)), np.mean(np.log(points.tokens))
    starts = law.moved(law.starts() if starts is None else starts, *middle)
    rough = _minimize(law, points, middle, starts, ROUGH)
    minima = _minimize(law, points, middle, rough.x[np.argsort(rough.value)[:FINISHED]], FINE)
    best = np.argmin(minima.value)
    if not np.isfinite(minima.value[best]):
        raise ConfigError(f"no starting point leads to a finite fit of {law.title}")
    x, value = minima.x[best], minima.value[best]
    near = int(np.sum(rough.value <= value * 1.001 + 1e-12))
    samples, converged = np.empty((0, len(x))), bool(minima.converged[best])
    if resamples:
        counts = resampled(count, resamples, seed, len(law.coefficients))
        refits = _refit(law, points, middle, _different(minima), counts)
        samples, converged = refits.x, converged and bool(refits.converged.all())
    home = lambda x: law.moved(x, -middle[0], -middle[1])
    return Fit(law, home(x), home(samples), float(value), (len(starts), near), converged)


def _different(minima: Minima) -> np.ndarray:
    """[minima, variables]: the best minimum and a few different ones that are nearly as good.

    If the runs do not determine a coefficient, a term may vanish in one fit and not in another;
    where it has vanished, its gradient is zero and a minimization cannot bring it back.
    """
    order = np.argsort(minima.value)
    near = order[minima.value[order] <= NEARLY * minima.value[order[0]]]
    chosen = [minima.x[near[0]]]
    for x in minima.x[near[1:]]:
        if len(chosen) < MINIMA and all(np.max(np.abs(x - other)) > 0.1 for other in chosen):
            chosen.append(x)
    return np.array(chosen)


def _refit(law: Law, points: Points, middle, starts, counts) -> Minima:
    """The best fit over all starts for each row of counts [resamples, points]."""
    resamples, several = len(counts), len(starts)
    minima = _minimize(
        law, points, middle, np.repeat(starts, resamples, 0), FINE, np.tile(counts, (several, 1))
    )
    best = np.argmin(minima.value.reshape(several, resamples), 0) * resamples
    return Minima(*(part[best + np.arange(resamples)] for part in minima))


def _minimize(law: Law, points: Points, middle, starts, tolerance, weights=None) -> Minima:
    """Minimizes from starts relative to `middle`, with weights [starts, points] or 1."""
    log_n, log_d = np.log(points.parameters) - middle[0], np.log(points.tokens) - middle[1]
    log_loss = np.log(points.loss)
    size = max(1, CHUNK // len(log_loss))

    def objective(x, rows):
        parts = [
            huber_sums(law, x[i : i + size], log_n, log_d, log_loss,
                       1.0 if weights is None else weights[rows[i : i + size]])
            for i in range(0, len(x), size)
        ]  # fmt: skip
        return tuple(np.concatenate(part) for part in zip(*parts, strict=True))

    with np.errstate(all="ignore"):  # a step that is too long overflows and is then rejected
        return minimize(objective, starts, tolerance=tolerance)


def huber_sums(law: Law, x, log_n, log_d, log_loss, weights=1.0):
    """The objective [batch] and its gradient [batch, variables].

    Args:
      law: the law.
      x: [batch, variables].
      log_n, log_d, log_loss: [points].
      weights: weights of the points, [batch, points] or a number.
    """
    predicted, pullback = law.predict(x, log_n, log_d)
    error = predicted - log_loss
    clipped = np.clip(error, -DELTA, DELTA)
    weighted = clipped * weights
    value = np.einsum("bp,bp->b", weighted, error - clipped / 2)
    return value, pullback(weighted)
