"""The energy distance of two sets of examples: a divergence that needs no network."""

import numpy as np


def energy_distance(real: np.ndarray, drawn: np.ndarray) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| (Szekely and Rizzo 2013, equation 3), unbiased.

    Zero for equal distributions alone; estimates of near ones may fall below. One example alone
    counts as without spread.

    Args:
      real: [n, ...].
      drawn: [m, ...], in the same unit.
    """
    from scipy.spatial.distance import cdist  # slow to import

    x, y = (np.asarray(a, np.float64).reshape(len(a), -1) for a in (real, drawn))
    within = lambda a: cdist(a, a).sum() / (len(a) * max(len(a) - 1, 1))
    return float(2 * cdist(x, y).mean() - within(x) - within(y))
