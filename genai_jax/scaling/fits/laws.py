"""The laws of the loss that are fitted: functions of log N and log D, with their gradients.

The variables of a law are chosen to make the fit well conditioned: they are logarithms, relative to
a reference size in the middle of the data. Relative to N = D = 1, far from any run, a small change
of alpha would be almost indistinguishable from one of A.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Protocol

import numpy as np

# Gradient w.r.t. log loss [batch, points] -> gradient w.r.t. variables [batch, variables].
Pullback = Callable[[np.ndarray], np.ndarray]


class Law(Protocol):
    """A function (log N, log D) -> log loss.

    Attributes:
      title: its paper and formula.
      coefficients: names of its coefficients, as in the paper.
    """

    title: str
    coefficients: tuple[str, ...]

    def predict(
        self, x: np.ndarray, log_n: np.ndarray, log_d: np.ndarray
    ) -> tuple[np.ndarray, Pullback]:
        """Log loss [batch, points] for variables [batch, variables] and log sizes [points]."""

    def moved(self, x: np.ndarray, by_n: float, by_d: float) -> np.ndarray:
        """Variables [..., variables] of the same law in terms of log N - by_n, log D - by_d."""

    def values(self, x: np.ndarray) -> np.ndarray:
        """Coefficients [..., variables] for variables relative to N = D = 1."""

    def starts(self) -> np.ndarray:
        """Starting points of a fit, [starts, variables] relative to N = D = 1."""


class Parametric:
    """L = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, approach 3, equation 2).

    Variables: a, b, e, alpha, beta, where A = exp(a), B = exp(b), E = exp(e).
    """

    title: ClassVar = "Hoffmann et al. 2022, L = E + A / N^alpha + B / D^beta"
    coefficients: ClassVar = ("E", "A", "B", "alpha", "beta")

    def predict(self, x, log_n, log_d):
        a, b, e, alpha, beta = (x[:, i, None] for i in range(5))
        # Without log-sum-exp's shift by the largest term, to save passes over [batch, points]: only
        # a step that is too long overflows, and the line search rejects it.
        size, data, rest = np.exp(a - alpha * log_n), np.exp(b - beta * log_d), np.exp(e)
        total = size + data + rest

        def pullback(gradient):
            share = gradient / total
            of_size, of_data = share * size, share * data
            of_rest = np.sum(share, 1) * rest[:, 0]
            return np.stack(
                [of_size.sum(1), of_data.sum(1), of_rest, -(of_size @ log_n), -(of_data @ log_d)],
                axis=1,
            )

        return np.log(total), pullback

    def moved(self, x, by_n, by_d):
        a, b, e, alpha, beta = np.moveaxis(x, -1, 0)
        return np.stack([a - alpha * by_n, b - beta * by_d, e, alpha, beta], -1)

    def values(self, x):
        a, b, e, alpha, beta = np.moveaxis(x, -1, 0)
        with np.errstate(over="ignore"):  # A, if the loss hardly depends on N
            return np.stack([np.exp(e), np.exp(a), np.exp(b), alpha, beta], -1)

    def variables(self, values: np.ndarray) -> np.ndarray:
        """The inverse of `values`."""
        e, a, b, alpha, beta = np.moveaxis(np.asarray(values, np.float64), -1, 0)
        return np.stack([np.log(a), np.log(b), np.log(e), alpha, beta], -1)

    def starts(self):
        """The 4,500 starting points of Hoffmann et al. 2022, appendix D.2."""
        logs, powers = np.arange(0, 30, 5.0), np.arange(0, 2.5, 0.5)
        return _grid(logs, logs, np.arange(-1, 1.5, 0.5), powers, powers)


class KaplanJoint:
    """L = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D (Kaplan et al. 2020, equation 1.5).

    Variables: alpha_N log N_c, alpha_D log D_c, log alpha_N, log alpha_D. L is the p-norm, with
    p = 1 / alpha_D, of (N_c / N)^alpha_N and (D_c / D)^alpha_D.
    """

    title: ClassVar = "Kaplan et al. 2020, L = ((N_c/N)^(alpha_N/alpha_D) + D_c/D)^alpha_D"
    coefficients: ClassVar = ("N_c", "D_c", "alpha_N", "alpha_D")

    def predict(self, x, log_n, log_d):
        a, b = x[:, 0, None], x[:, 1, None]
        alpha_n, alpha_d = np.exp(x[:, 2, None]), np.exp(x[:, 3, None])
        size, data = a - alpha_n * log_n, b - alpha_d * log_d
        log_loss = alpha_d * np.logaddexp(size / alpha_d, data / alpha_d)
        share = np.exp((size - log_loss) / alpha_d)  # of the N term; both shares sum to 1

        def pullback(gradient):
            of_size, of_data = gradient * share, gradient * (1 - share)
            mixed = share * size + (1 - share) * data
            of_index = np.sum(gradient * (log_loss - mixed), 1)  # alpha_D as 1 / p of the norm
            return np.stack(
                [
                    of_size.sum(1),
                    of_data.sum(1),
                    -(of_size @ log_n) * alpha_n[:, 0],
                    -(of_data @ log_d) * alpha_d[:, 0] + of_index,
                ],
                axis=1,
            )

        return log_loss, pullback

    def moved(self, x, by_n, by_d):
        a, b, log_alpha_n, log_alpha_d = np.moveaxis(x, -1, 0)
        a, b = a - np.exp(log_alpha_n) * by_n, b - np.exp(log_alpha_d) * by_d
        return np.stack([a, b, log_alpha_n, log_alpha_d], -1)

    def values(self, x):
        a, b, log_alpha_n, log_alpha_d = np.moveaxis(x, -1, 0)
        with np.errstate(over="ignore"):  # N_c, if the loss hardly falls with N
            alpha_n, alpha_d = np.exp(log_alpha_n), np.exp(log_alpha_d)
            return np.stack([np.exp(a / alpha_n), np.exp(b / alpha_d), alpha_n, alpha_d], -1)

    def starts(self):
        logs, powers = np.arange(0, 12, 2.0), np.log([0.03, 0.1, 0.3, 1.0])
        return _grid(logs, logs, powers, powers)


def _grid(*axes) -> np.ndarray:
    """[points, axes]: all combinations of the values on the axes."""
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))
