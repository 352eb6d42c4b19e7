"""The kernel distance between two sets of features (with Inception features, KID)."""

import numpy as np

_BLOCK = 1024  # rows of a kernel matrix at a time


def kernel_distance(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Squared maximum mean discrepancy of features [n, dim] and [m, dim], and its standard error.

    The unbiased estimate from all pairs with the kernel (x y / dim + 1)^3 (Bińkowski et al. 2018,
    section 4, who average it over subsets). The standard error is a jackknife over the rows of both
    sides (Efron and Stein 1981), which errs on the large side where the sets are alike.

    Raises:
      ValueError: fewer than three feature vectors on either side.
    """
    n, m = len(a), len(b)
    if min(n, m) < 3:
        raise ValueError(
            f"the kernel distance needs 3 feature vectors on each side, not {n} and {m}"
        )
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    within_a, within_b = (_row_sums(x, x) - _kernel_of_pairs(x, x) for x in (a, b))
    between_a, between_b = _row_sums(a, b), _row_sums(b, a)

    def estimate(n, m, within_a, within_b, between):
        return within_a / (n * (n - 1)) + within_b / (m * (m - 1)) - 2 * between / (n * m)

    sums = within_a.sum(), within_b.sum(), between_a.sum()
    without_a = estimate(n - 1, m, sums[0] - 2 * within_a, sums[1], sums[2] - between_a)
    without_b = estimate(n, m - 1, sums[0], sums[1] - 2 * within_b, sums[2] - between_b)
    variance = sum((len(x) - 1) * np.var(x) for x in (without_a, without_b))
    return float(estimate(n, m, *sums)), float(np.sqrt(variance))


def _kernel_of_pairs(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """k(x_i, y_i), [n]."""
    return (np.sum(x * y, 1) / x.shape[1] + 1) ** 3


def _row_sums(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The sum of k(x_i, y_j) over j, [n]."""
    blocks = (x[i : i + _BLOCK] for i in range(0, len(x), _BLOCK))
    return np.concatenate([((part @ y.T / x.shape[1] + 1) ** 3).sum(1) for part in blocks])
