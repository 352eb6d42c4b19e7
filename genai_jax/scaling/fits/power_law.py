"""Power laws, which are lines in log-log coordinates, and Kaplan's laws of one variable."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from genai_jax.config import ConfigError
from genai_jax.scaling.fits.bootstrap import RESAMPLES, interval, resampled
from genai_jax.scaling.fits.points import Points, check_enough


class PowerLaw(NamedTuple):
    """y = scale x^power.

    Attributes:
      log_scale: natural logarithm of the scale.
      power: the exponent.
      samples: [resamples, 2] of both; NaN for a resample without a line.
      range: smallest and largest fitted x.
    """

    log_scale: float
    power: float
    samples: np.ndarray
    range: tuple[float, float]

    def __call__(self, x) -> np.ndarray:
        """y [points] for x [points] or a number."""
        return np.exp(self.log_scale + self.power * np.log(np.atleast_1d(x)))

    def sampled(self, x) -> np.ndarray:
        """y [resamples, points] by the line of each resample."""
        log_scale, power = self.samples[:, :1], self.samples[:, 1:]
        return np.exp(log_scale + power * np.log(np.atleast_1d(x)))

    def power_interval(self) -> tuple[float, float]:
        low, high = interval(self.samples[:, 1])
        return float(low), float(high)


def fit_line(x, y, weights=None) -> np.ndarray:
    """(log scale, power) by least squares of log y on log x.

    Args:
      x: [..., points].
      y: [..., points].
      weights: [..., points], or 1.

    Returns:
      [..., 2]; NaN where all x with a weight are equal.
    """
    log_x, log_y = np.log(x), np.log(y)
    weights = np.ones_like(log_x) if weights is None else weights
    mean = lambda values: np.sum(weights * values, -1) / np.sum(weights, -1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_x, mean_y = mean(log_x), mean(log_y)
        x_away, y_away = log_x - mean_x[..., None], log_y - mean_y[..., None]
        variance = mean(x_away**2)
        power = np.where(variance > 1e-20, mean(x_away * y_away) / variance, np.nan)
        return np.stack([mean_y - power * mean_x, power], -1)


def fit_power_law(x: np.ndarray, y: np.ndarray, resamples: int, seed: int) -> PowerLaw:
    """The power law fitted to x, y [points], with bootstrap resamples for intervals."""
    check_enough(len(x), 2, "a power law")
    counts = resampled(len(x), resamples, seed, 2)
    log_scale, power = fit_line(x, y)
    if np.isnan(power):
        raise ConfigError(f"a power law needs two different values, but all {len(x)} are {x[0]:g}")
    samples = fit_line(np.tile(x, (resamples, 1)), np.tile(y, (resamples, 1)), counts)
    return PowerLaw(float(log_scale), float(power), samples, (float(np.min(x)), float(np.max(x))))


def frontier(x: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Indices, by increasing x, of the runs that no run with the same or smaller x beats."""
    order = np.lexsort((loss, x))
    best = np.minimum.accumulate(loss[order])
    return order[np.concatenate([[True], best[1:] < best[:-1]])]


KAPLAN = {
    "N": ("parameters", "Kaplan et al. 2020, equation 1.1: L = (N_c / N)^alpha_N"),
    "D": ("tokens", "Kaplan et al. 2020, equation 1.2: L = (D_c / D)^alpha_D"),
    "C": ("flops", "Kaplan et al. 2020, equation 1.3: L = (C_c / C)^alpha_C"),
}


class KaplanLaw(NamedTuple):
    """L = (critical / x)^alpha.

    The laws of N and D assume that the other one does not limit the loss. To the extent that it
    does on the fitted frontier, which is not at infinite data or size, their exponents are too
    small.
    """

    x: np.ndarray  # [points] on the frontier
    loss: np.ndarray  # [points]
    line: PowerLaw

    @property
    def alpha(self) -> float:
        return -self.line.power

    @property
    def critical(self) -> float:
        """N_c, D_c or C_c, at which the loss would be 1."""
        with np.errstate(over="ignore"):
            return float(np.exp(self.line.log_scale / self.alpha))

    def alpha_interval(self) -> tuple[float, float]:
        low, high = self.line.power_interval()
        return -high, -low


def fit_kaplan(points: Points, of: str, resamples: int = RESAMPLES, seed: int = 0) -> KaplanLaw:
    """The law of N, D or C, fitted to the frontier of the runs.

    Args:
      points: the runs.
      of: a key of `KAPLAN`.
      resamples: number of bootstrap resamples of the runs on the frontier.
      seed: random seed for the bootstrap.

    Raises:
      ConfigError: fewer than two runs on the frontier.
    """
    x = getattr(points, KAPLAN[of][0])
    best = frontier(x, points.loss)
    check_enough(len(best), 2, f"{KAPLAN[of][1]}, fitted to the frontier of the runs,")
    line = fit_power_law(x[best], points.loss[best], resamples, seed)
    return KaplanLaw(x[best], points.loss[best], line)
