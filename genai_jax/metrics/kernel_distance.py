"""The kernel distance between two sets of features (with Inception features, KID)."""

import numpy as np


def kernel_distance(
    a: np.ndarray, b: np.ndarray, *, subsets: int = 50, subset_size: int = 500, seed: int = 0
) -> tuple[float, float]:
    """Squared maximum mean discrepancy of features [n, dim] and [m, dim]: mean and standard error.

    The unbiased estimate with the kernel (x y / dim + 1)^3, over random subsets (Binkowski et al.
    2018, section 4).

    Raises:
      ValueError: fewer than two feature vectors on either side.
    """
    rng = np.random.default_rng(seed)
    size = min(subset_size, len(a), len(b))
    if size < 2:
        raise ValueError(
            f"the kernel distance needs 2 feature vectors on each side, not {len(a)} and {len(b)}"
        )
    estimates = [
        _mmd(a[rng.permutation(len(a))[:size]], b[rng.permutation(len(b))[:size]])
        for _ in range(subsets)
    ]
    return float(np.mean(estimates)), float(np.std(estimates) / np.sqrt(subsets))


def _mmd(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    kernel = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3
    within = lambda k: (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))
    return within(kernel(a, a)) + within(kernel(b, b)) - 2 * kernel(a, b).mean()
