"""The energy distance between two sets of examples: a divergence that needs no network."""

import numpy as np


def energy_distance(real: np.ndarray, generated: np.ndarray) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| (Szekely and Rizzo 2013, equation 3), unbiased.

    It is zero only for equal distributions; estimates for similar ones may be negative. The spread
    of a single example counts as 0.

    Args:
      real: real examples, [n, ...].
      generated: generated examples, [m, ...], in the same units.
    """
    from scipy.spatial.distance import cdist  # slow to import

    x, y = (np.asarray(a, np.float64).reshape(len(a), -1) for a in (real, generated))
    within = lambda a: cdist(a, a).sum() / (len(a) * max(len(a) - 1, 1))
    return float(2 * cdist(x, y).mean() - within(x) - within(y))
