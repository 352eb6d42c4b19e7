"""Fits a law of loss to runs, and says how sure it is."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from genai_jax.config import ConfigError
from genai_jax.scaling.fits.bootstrap import interval, resampled
from genai_jax.scaling.fits.laws import Law
from genai_jax.scaling.fits.minimize import Minima, minimize
from genai_jax.scaling.fits.points import Points, check_enough, check_spread

DELTA = 1e-3  # of the Huber loss, on log loss (Hoffmann et al. 2022, equation 3)
CHUNK = 25_000  # numbers: an array of these stays in the cache
ROUGH, FINE = 1e-6, 1e-12  # relative improvements at which a fit ends
NEARLY, MINIMA = 1.5, 4  # times the best objective, and how many fits, for resamples to begin at
FINISHED = 64  # of the fits that end best, these go on to the finer one


class Fit(NamedTuple):
    """A law, fitted.

    Attributes:
      law: which.
      x: [variables] of it, relative to N = D = 1.
      samples: [resamples, variables], of fits to resampled points.
      objective: the sum of Huber losses.
      starts: how many fits were begun from the grid, and how many of them came to within a
        thousandth of the best objective.
      converged: whether the best start and all resamples did.
    """

    law: Law
    x: np.ndarray
    samples: np.ndarray
    objective: float
    starts: tuple[int, int]
    converged: bool

    @property
    def values(self) -> dict[str, float]:
        """Name of a coefficient -> value."""
        return dict(zip(self.law.coefficients, self.law.values(self.x).tolist(), strict=True))

    def intervals(self, level: float = 0.95) -> dict[str, tuple[float, float]]:
        """Name of a coefficient -> its percentile interval."""
        low, high = interval(self.law.values(self.samples), level)
        return dict(zip(self.law.coefficients, zip(low, high, strict=True), strict=True))

    def loss(self, parameters, tokens) -> np.ndarray:
        """Predicted loss of runs, [points] for arrays or numbers that broadcast to it."""
        return self._losses(self.x[None], parameters, tokens)[0]

    def sampled_losses(self, parameters, tokens) -> np.ndarray:
        """[resamples, points]: the loss that each resample's law predicts."""
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
    """Minimizes the sum over points of the Huber loss of log loss, from many starts.

    Resampled points are fitted from the best fit, and from others that are nearly as good.

    Args:
      law: which.
      points: the runs.
      starts: [starts, variables] of the law, relative to N = D = 1; its own grid if not given.
      resamples: draws of the points with replacement, for intervals.
      seed: of the draws.

    Raises:
      ConfigError: fewer points than coefficients, or all of one or two sizes.
    """
    count = len(points.loss)
    check_enough(count, len(law.coefficients), f"the law {law.title}")
    check_spread(points)
    middle = np.mean(np.log(points.parameters)), np.mean(np.log(points.tokens))
    starts = law.moved(law.starts() if starts is None else starts, *middle)
    rough = _minimize(law, points, middle, starts, ROUGH)
    found = _minimize(law, points, middle, rough.x[np.argsort(rough.value)[:FINISHED]], FINE)
    best = np.argmin(found.value)
    if not np.isfinite(found.value[best]):
        raise ConfigError(f"no start leads to a finite fit of {law.title}")
    x, value = found.x[best], found.value[best]
    near = int(np.sum(rough.value <= value * 1.001 + 1e-12))
    samples, converged = np.empty((0, len(x))), bool(found.converged[best])
    if resamples:
        counts = resampled(count, resamples, seed, len(law.coefficients))
        again = _refit(law, points, middle, _different(found), counts)
        samples, converged = again.x, converged and bool(again.converged.all())
    home = lambda x: law.moved(x, -middle[0], -middle[1])
    return Fit(law, home(x), home(samples), float(value), (len(starts), near), converged)


def _different(found: Minima) -> np.ndarray:
    """[minima, variables]: the best of them and a few that differ and are nearly as good.

    Where runs leave a coefficient open, a term may vanish in one fit and not in the next: from
    where it has vanished nothing leads back.
    """
    order = np.argsort(found.value)
    near = order[found.value[order] <= NEARLY * found.value[order[0]]]
    chosen = [found.x[near[0]]]
    for x in found.x[near[1:]]:
        if len(chosen) < MINIMA and all(np.max(np.abs(x - other)) > 0.1 for other in chosen):
            chosen.append(x)
    return np.array(chosen)


def _refit(law: Law, points: Points, middle, starts, counts) -> Minima:
    """The best, for each row of counts [resamples, points], of the fits from all starts."""
    resamples, several = len(counts), len(starts)
    found = _minimize(
        law, points, middle, np.repeat(starts, resamples, 0), FINE, np.tile(counts, (several, 1))
    )
    best = np.argmin(found.value.reshape(several, resamples), 0) * resamples + np.arange(resamples)
    return Minima(*(part[best] for part in found))


def _minimize(law: Law, points: Points, middle, starts, tolerance, weights=None) -> Minima:
    """From variables relative to `middle`; weights [starts, points] of the points, or 1."""
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

    with np.errstate(all="ignore"):  # a step that is too long overflows, and is taken back
        return minimize(objective, starts, tolerance=tolerance)


def huber_sums(law: Law, x, log_n, log_d, log_loss, weights=1.0):
    """The objective [batch] and its gradient [batch, variables].

    Args:
      law: which.
      x: [batch, variables].
      log_n, log_d, log_loss: [points].
      weights: of the points, [batch, points] or a number.
    """
    predicted, pullback = law.predict(x, log_n, log_d)
    error = predicted - log_loss
    clipped = np.clip(error, -DELTA, DELTA)
    weighted = clipped * weights
    value = np.einsum("bp,bp->b", weighted, error - clipped / 2)
    return value, pullback(weighted)
