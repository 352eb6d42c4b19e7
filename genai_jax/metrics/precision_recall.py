"""Precision and recall of drawn examples by nearest neighbours in feature space."""

import numpy as np


def precision_recall(real: np.ndarray, drawn: np.ndarray, neighbours: int = 3) -> tuple:
    """(precision, recall) of features [n, dim] (Kynkäänniemi et al. 2019, equations 1 and 2).

    Precision is the share of the drawn that lie within the distance from some real example to its
    k-th real neighbour; recall the share of the real, with the roles exchanged.
    """
    real, drawn = np.asarray(real, np.float64), np.asarray(drawn, np.float64)
    if min(len(real), len(drawn)) <= neighbours:
        raise ValueError(f"{len(real)} and {len(drawn)} examples; more than {neighbours} of each")
    between = _squared_distances(real, drawn)
    return (
        float(np.mean(np.any(between <= _radius(real, neighbours)[:, None], 0))),
        float(np.mean(np.any(between <= _radius(drawn, neighbours)[None], 1))),
    )


def _squared_distances(a, b) -> np.ndarray:
    squares = np.sum(a * a, 1)[:, None] + np.sum(b * b, 1)[None]
    return np.maximum(squares - 2 * a @ b.T, 0)


def _radius(x, neighbours) -> np.ndarray:
    """Squared distance of each to its k-th neighbour; the nearest of all is itself."""
    distances = _squared_distances(x, x)
    np.fill_diagonal(distances, 0)
    return np.partition(distances, neighbours, axis=1)[:, neighbours]
