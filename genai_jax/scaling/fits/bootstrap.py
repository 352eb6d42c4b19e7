"""Percentile bootstrap (Efron 1979): the spread of an estimate over resampled runs."""

from __future__ import annotations

import numpy as np

RESAMPLES = 500
LEVEL = 0.95


def resampled(
    points: int, resamples: int, seed: int, distinct: int, kinds: np.ndarray | None = None
) -> np.ndarray:
    """How often each point is drawn, [resamples, points], in as many draws as there are points.

    A draw with fewer than `distinct` different points, which fix no fit, is drawn again; points of
    the same one of `kinds` [points] are not different.
    """
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(points, np.full(points, 1 / points), resamples)
    kinds = np.arange(points) if kinds is None else kinds
    of_kind = (kinds[:, None] == np.unique(kinds)).astype(int)  # [points, kinds]
    while len(few := np.flatnonzero(np.sum(counts @ of_kind > 0, 1) < distinct)):
        counts[few] = rng.multinomial(points, np.full(points, 1 / points), len(few))
    return counts.astype(np.float64)


def interval(samples: np.ndarray, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """Percentiles of [resamples, ...] that hold `level` of it, (low [...], high [...]).

    What is nan, of a resample that fixed no fit, is left out; all of it gives nan.
    """
    tail = (1 - level) / 2
    if not np.isfinite(samples).any():
        return np.full((2, *samples.shape[1:]), np.nan)
    # Nearest: what was sampled may be infinite, and is then not to be interpolated.
    low, high = np.nanquantile(samples, [tail, 1 - tail], axis=0, method="nearest")
    return low, high
