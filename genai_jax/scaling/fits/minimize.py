"""Batched L-BFGS (Nocedal 1980): minimizes the same function from thousands of starting points.

The fit of a scaling law is so small that call overhead dominates: one after another, with
`scipy.optimize.minimize`, the 4,500 starting points of Hoffmann et al. (2022) take 50 times as long
as here, where every operation works on an array [starts, ...].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# (x [rows, variables], indices of the problems [rows]) -> (value [rows], gradient like x)
Objective = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]

MEMORY = 10  # number of steps that L-BFGS remembers
DECREASE, CURVATURE = 1e-4, 0.9  # constants of the weak Wolfe conditions


class Minima(NamedTuple):
    x: np.ndarray  # [batch, variables]
    value: np.ndarray  # [batch]
    converged: np.ndarray  # [batch] bool: not cut short by `max_evaluations`
    evaluations: np.ndarray  # [batch] int


def minimize(
    objective: Objective,
    starts: np.ndarray,
    *,
    tolerance: float = 1e-10,
    max_evaluations: int = 2000,
) -> Minima:
    """Minimizes each row of a batch independently.

    A row stops when two consecutive steps improve its value by less than `tolerance` times the
    value, when its gradient vanishes, or when no step along the descent direction improves it. The
    tolerance is relative, without a floor, because sums of Huber losses are small numbers.

    Args:
      objective: may return values that are not finite; such a step is shortened.
      starts: [batch, variables].
      tolerance: see above.
      max_evaluations: limit per row.
    """
    starts = np.asarray(starts, np.float64)
    batch = len(starts)
    minima = Minima(starts.copy(), np.empty(batch), np.ones(batch, bool), np.ones(batch, int))
    value, gradient = objective(starts, np.arange(batch))
    minima.value[:] = np.where(np.isfinite(value), value, np.inf)
    searches = _Searches.begin(starts, minima.value, gradient)
    while len(searches.row):
        x, value, gradient = searches.evaluate(objective)
        minima.evaluations[searches.row] += 1
        accepted = searches.search_line(value, gradient)
        searches.accept(accepted, x, value, gradient, tolerance)
        minima.x[searches.row], minima.value[searches.row] = searches.x, searches.value
        spent = minima.evaluations[searches.row] >= max_evaluations
        minima.converged[searches.row[spent & ~searches.done]] = False
        searches.keep(~(searches.done | spent))
    return minima


@dataclasses.dataclass
class _Searches:
    """The searches that have not stopped: arrays [rows, ...]."""

    row: np.ndarray  # indices in the batch
    x: np.ndarray
    value: np.ndarray
    gradient: np.ndarray
    direction: np.ndarray
    slope: np.ndarray  # of the value along the direction, negative
    step: np.ndarray  # step length to try next, between `low` and `high`
    low: np.ndarray
    high: np.ndarray
    quiet: np.ndarray  # number of consecutive steps that hardly improved the value
    done: np.ndarray
    moves: np.ndarray  # [rows, MEMORY, variables] steps, newest first
    bends: np.ndarray  # [rows, MEMORY, variables] changes of the gradient over these steps
    weights: np.ndarray  # [rows, MEMORY] 1 / (move . bend); 0 for steps that are not used

    @classmethod
    def begin(cls, x, value, gradient) -> _Searches:
        rows, variables = x.shape
        steepness = np.linalg.norm(gradient, axis=1)
        alive = np.isfinite(value) & np.isfinite(steepness) & (steepness > 0)
        searches = cls(
            row=np.arange(rows), x=x.copy(), value=value.copy(), gradient=gradient,
            direction=-gradient, slope=-(steepness**2),
            step=1 / np.maximum(steepness, 1.0), low=np.zeros(rows), high=np.full(rows, np.inf),
            quiet=np.zeros(rows, int), done=~alive, moves=np.zeros((rows, MEMORY, variables)),
            bends=np.zeros((rows, MEMORY, variables)), weights=np.zeros((rows, MEMORY)),
        )  # fmt: skip
        searches.keep(alive)
        return searches

    def keep(self, which: np.ndarray):
        if not which.all():
            for f in dataclasses.fields(self):
                setattr(self, f.name, getattr(self, f.name)[which])

    def evaluate(self, objective: Objective):
        """(x, value, gradient) after a step along the direction."""
        x = self.x + self.step[:, None] * self.direction
        value, gradient = objective(x, self.row)
        usable = np.isfinite(value) & np.isfinite(gradient).all(1)
        return x, np.where(usable, value, np.inf), np.where(usable[:, None], gradient, 0.0)

    def search_line(self, value, gradient) -> np.ndarray:
        """Indices of the steps that meet the weak Wolfe conditions; bisects or doubles the others.

        Bisection with the weak conditions also handles kinks (Lewis and Overton 2013), which Huber
        losses with a small delta nearly have.
        """
        too_long = value > self.value + DECREASE * self.step * self.slope
        too_short = ~too_long & (_dot(gradient, self.direction) < CURVATURE * self.slope)
        self.high = np.where(too_long, self.step, self.high)
        self.low = np.where(too_short, self.step, self.low)
        between = np.where(np.isinf(self.high), 2 * self.step, (self.low + self.high) / 2)
        rejected = too_long | too_short
        self.step = np.where(rejected, between, self.step)
        narrow = (self.high - self.low < 1e-12 * self.high) | (self.step < 1e-16)
        self.done = rejected & narrow
        return np.flatnonzero(~rejected)

    def accept(self, rows, x, value, gradient, tolerance: float):
        """Takes the steps of some rows and starts new line searches there."""
        if not len(rows):
            return
        move, bend = x[rows] - self.x[rows], gradient[rows] - self.gradient[rows]
        small = self.value[rows] - value[rows] <= tolerance * np.abs(value[rows])
        self.quiet[rows] = np.where(small, self.quiet[rows] + 1, 0)
        self.x[rows], self.value[rows], self.gradient[rows] = x[rows], value[rows], gradient[rows]
        self.done[rows] |= (self.quiet[rows] >= 2) | (gradient[rows] == 0).all(1)
        self._remember(rows, move, bend)
        self._aim(rows)

    def _remember(self, rows, move, bend):
        product = _dot(move, bend)
        for memory, new in (
            (self.moves, move),
            (self.bends, bend),
            (self.weights, np.divide(1, product, out=np.zeros(len(rows)), where=product > 0)),
        ):
            memory[rows, 1:] = memory[rows, :-1]
            memory[rows, 0] = new

    def _aim(self, rows):
        """Sets the direction by the two-loop recursion, or to steepest descent if that ascends."""
        moves, bends, weights = self.moves[rows], self.bends[rows], self.weights[rows]
        direction = -self.gradient[rows]
        shares = np.zeros((len(rows), MEMORY))
        for i in range(MEMORY):
            shares[:, i] = weights[:, i] * _dot(moves[:, i], direction)
            direction -= shares[:, i, None] * bends[:, i]
        bent = weights[:, 0] * _dot(bends[:, 0], bends[:, 0])
        direction /= np.where(bent > 0, bent, 1)[:, None]
        for i in reversed(range(MEMORY)):
            back = weights[:, i] * _dot(bends[:, i], direction)
            direction += (shares[:, i] - back)[:, None] * moves[:, i]
        slope = _dot(self.gradient[rows], direction)
        up = slope >= 0
        direction[up] = -self.gradient[rows[up]]
        self.weights[rows[up]] = 0
        self.direction[rows] = direction
        self.slope[rows] = np.where(up, -_dot(direction, direction), slope)
        self.step[rows], self.low[rows], self.high[rows] = 1.0, 0.0, np.inf


def _dot(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Row-wise dot product: [rows, variables] x [rows, variables] -> [rows]."""
    return np.einsum("rv,rv->r", x, y)
