"""The parametric law, fitted by variable projection (Golub and Pereyra 1973).

For given exponents, L = E + A / N^alpha + B / D^beta is linear in E, A and B, and non-negative
least squares finds these exactly; what remains is a search over two exponents. This fit minimizes
squared relative errors, unlike the other one, which minimizes Huber losses: if the two agree,
outliers do not dominate.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from genai_jax.scaling.fits.bootstrap import interval, resampled
from genai_jax.scaling.fits.minimize import minimize
from genai_jax.scaling.fits.points import Points, check_enough, check_spread

COEFFICIENTS = ("E", "A", "B", "alpha", "beta")
STARTS = np.log(list(itertools.product(np.geomspace(0.02, 2, 12), repeat=2)))  # log exponents


class Projected(NamedTuple):
    """The fitted law."""

    values: np.ndarray  # [5], in the order of `COEFFICIENTS`
    samples: np.ndarray  # [resamples, 5], of fits to resampled points
    error: float  # root mean square of the relative errors

    def loss(self, parameters, tokens) -> np.ndarray:
        """Predicted loss [points] for parameters and tokens [points]."""
        e, a, b, alpha, beta = self.values
        return e + a * parameters**-alpha + b * tokens**-beta

    def intervals(self) -> dict[str, tuple[float, float]]:
        low, high = interval(self.samples)
        return dict(zip(COEFFICIENTS, zip(low, high, strict=True), strict=True))


def fit_projected(points: Points, *, resamples: int = 0, seed: int = 0) -> Projected:
    """Minimizes the sum of squared relative errors; resamples start at the best exponents.

    Raises:
      ConfigError: fewer points than coefficients, or fewer than three sizes.
    """
    count = len(points.loss)
    check_enough(count, len(COEFFICIENTS), "the law L = E + A / N^alpha + B / D^beta")
    check_spread(points)
    problem = _Problem(points)
    minima = problem.solve(STARTS, np.ones((len(STARTS), count)))
    best = np.argmin(minima.value)
    weights = resampled(count, resamples, seed, len(COEFFICIENTS))
    refits = problem.solve(np.tile(minima.x[best], (resamples, 1)), weights)
    values = problem.values(minima.x[best, None], np.ones((1, count)))[0]
    error = float(np.sqrt(minima.value[best] / count))
    return Projected(values, problem.values(refits.x, weights), error)


class _Problem:
    """The error of the best E, A and B, as a function of log alpha and log beta."""

    def __init__(self, points: Points):
        self.middle = np.mean(np.log(points.parameters)), np.mean(np.log(points.tokens))
        self.log_n = np.log(points.parameters) - self.middle[0]
        self.log_d = np.log(points.tokens) - self.middle[1]
        self.loss = points.loss

    def solve(self, starts, weights):
        """Minimizes from log exponents [batch, 2], with weights [batch, points]."""
        with np.errstate(all="ignore"):
            return minimize(lambda x, rows: self._error(x, weights[rows]), starts, tolerance=1e-12)

    def values(self, x, weights) -> np.ndarray:
        """Values [batch, 5] of `COEFFICIENTS` for log exponents [batch, 2]."""
        powers = np.exp(x)
        e, a, b = nonnegative(self._rows(powers), weights).T
        with np.errstate(over="ignore"):  # in a resample that does not determine an exponent
            a, b = (c * np.exp(powers[:, i] * self.middle[i]) for i, c in enumerate((a, b)))
        return np.stack([e, a, b, *powers.T], -1)

    def _rows(self, powers) -> np.ndarray:
        """[batch, points, 3]: the three terms divided by the loss that they should add up to."""
        size, data = np.exp(-powers[:, :1] * self.log_n), np.exp(-powers[:, 1:] * self.log_d)
        return np.stack([np.ones_like(size), size, data], -1) / self.loss[:, None]

    def _error(self, x, weights):
        """Error [batch] and its gradient; E, A and B are optimal, so they act as constants."""
        powers = np.exp(x)
        rows = self._rows(powers)
        linear = nonnegative(rows, weights)
        errors = np.einsum("bpt,bt->bp", rows, linear) - 1
        slopes = [
            -2 * powers[:, i] * linear[:, i + 1]
            * np.einsum("bp,bp,p->b", weights * errors, rows[..., i + 1], logs)
            for i, logs in enumerate((self.log_n, self.log_d))
        ]  # fmt: skip
        return np.einsum("bp,bp->b", weights, errors**2), np.stack(slopes, -1)


# Masks [8, 3] of coefficients that may be nonzero.
SUPPORTS = np.array(list(itertools.product((1.0, 0.0), repeat=3)))


def nonnegative(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Non-negative least squares of 1 on three columns, [batch, 3].

    The solution is an ordinary least-squares solution on a subset of the columns, one of eight.

    Args:
      rows: [batch, points, 3].
      weights: [batch, points].
    """
    weighted = rows * weights[..., None]
    gram = np.einsum("bpi,bpj->bij", weighted, rows)
    right = np.sum(weighted, 1)
    keep = SUPPORTS[:, None, :, None] * SUPPORTS[:, None, None, :]
    # An exponent near 0 makes a second constant column: the 1e-13 keeps the matrix regular.
    rest = np.eye(3) * ((1 - SUPPORTS)[:, None, :, None] + 1e-13)
    scale = np.sqrt(np.einsum("bii->bi", gram))  # unit columns minimize rounding errors
    scaled = gram / (scale[:, :, None] * scale[:, None, :])
    target = (SUPPORTS[:, None] * (right / scale))[..., None]
    solved = np.linalg.solve(scaled * keep + rest, target)[..., 0] / scale  # [8, batch, 3]
    error = np.einsum("sbi,bij,sbj->sb", solved, gram, solved) - 2 * np.sum(solved * right, -1)
    error = np.where((solved >= 0).all(-1), error, np.inf)
    return np.take_along_axis(solved, np.argmin(error, 0)[None, :, None], 0)[0]
