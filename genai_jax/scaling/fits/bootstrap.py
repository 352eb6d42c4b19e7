"""Percentile bootstrap (Efron 1979): intervals from the spread over resampled runs."""

from __future__ import annotations

import numpy as np

RESAMPLES = 500
LEVEL = 0.95


def resampled(
    points: int, resamples: int, seed: int, distinct: int, kinds: np.ndarray | None = None
) -> np.ndarray:
    """How often each resample contains each point, [resamples, points].

    Points are sampled with replacement, as many as there are. A resample with fewer than `distinct`
    different points, too few for a fit, is replaced by another; points with equal `kinds` [points]
    do not count as different.
    """
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(points, np.full(points, 1 / points), resamples)
    kinds = np.arange(points) if kinds is None else kinds
    of_kind = (kinds[:, None] == np.unique(kinds)).astype(int)  # [points, kinds]
    while len(few := np.flatnonzero(np.sum(counts @ of_kind > 0, 1) < distinct)):
        counts[few] = rng.multinomial(points, np.full(points, 1 / points), len(few))
    return counts.astype(np.float64)


def interval(samples: np.ndarray, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """(low [...], high [...]): percentiles of `samples` [resamples, ...] that enclose `level`.

    Resamples that allowed no fit are NaN and left out; the interval is NaN if all of them are.
    """
    tail = (1 - level) / 2
    if not np.isfinite(samples).any():
        return np.full((2, *samples.shape[1:]), np.nan)
    # Nearest, because samples may be infinite and must then not be interpolated.
    low, high = np.nanquantile(samples, [tail, 1 - tail], axis=0, method="nearest")
    return low, high
