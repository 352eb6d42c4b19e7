"""The Frechet distance between two sets of features, each modeled as a Gaussian."""

import numpy as np


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Distance of features [n, dim] to features [m, dim], in float64.

    Heusel et al. 2017, equation 6.

    Raises:
      ValueError: fewer than two feature vectors.
    """
    return gaussian_distance(*moments(a), *moments(b))


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [dim] and unbiased covariance [dim, dim]."""
    features = np.asarray(features, np.float64)
    if len(features) < 2:
        raise ValueError(f"a covariance needs at least 2 feature vectors, not {len(features)}")
    return features.mean(0), np.cov(features, rowvar=False).reshape(features.shape[1], -1)


def gaussian_distance(mean_a, cov_a, mean_b, cov_b) -> float:
    """|mean_a - mean_b|^2 + trace(A + B - 2 (A^1/2 B A^1/2)^1/2), at least 0 despite rounding.

    The symmetric product has only real, non-negative eigenvalues.
    """
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ cov_b @ root)
    cross = np.sqrt(np.maximum(cross, 0)).sum()
    gap = np.sum(np.square(mean_a - mean_b))
    return max(float(gap + np.trace(cov_a) + np.trace(cov_b) - 2 * cross), 0.0)
