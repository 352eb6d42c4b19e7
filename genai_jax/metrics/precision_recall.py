"""Precision and recall of generated examples, by nearest neighbors in feature space."""

import numpy as np


def precision_recall(real: np.ndarray, generated: np.ndarray, neighbors: int = 3) -> tuple:
    """(precision, recall) of features [n, dim] (Kynkäänniemi et al. 2019, equations 1 and 2).

    Precision is the fraction of generated examples that are at least as close to some real example
    as that example's k-th nearest real neighbor; recall is the same with the roles exchanged.

    Raises:
      ValueError: no more than `neighbors` examples on either side.
    """
    real, generated = np.asarray(real, np.float64), np.asarray(generated, np.float64)
    if min(len(real), len(generated)) <= neighbors:
        raise ValueError(
            f"precision and recall need more than {neighbors} examples on each side, not "
            f"{len(real)} and {len(generated)}"
        )
    between = _squared_distances(real, generated)
    return (
        float(np.mean(np.any(between <= _squared_radius(real, neighbors)[:, None], 0))),
        float(np.mean(np.any(between <= _squared_radius(generated, neighbors)[None], 1))),
    )


def _squared_distances(a, b) -> np.ndarray:
    squares = np.sum(a * a, 1)[:, None] + np.sum(b * b, 1)[None]
    return np.maximum(squares - 2 * a @ b.T, 0)


def _squared_radius(x, neighbors) -> np.ndarray:
    """Squared distance of each example to its k-th neighbor; the 0-th is the example itself."""
    distances = _squared_distances(x, x)
    np.fill_diagonal(distances, 0)
    return np.partition(distances, neighbors, axis=1)[:, neighbors]
