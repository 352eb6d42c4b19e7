"""All scores of drawn examples against real ones, from features of both."""

import numpy as np

from genai_jax.metrics.frechet import frechet_distance
from genai_jax.metrics.kernel_distance import kernel_distance
from genai_jax.metrics.precision_recall import precision_recall


def sample_scores(real: np.ndarray, drawn: np.ndarray, features: str, seed: int = 0) -> dict:
    """Scores named after the features: FD-<features> is ``fd_<features>``, never FID.

    Args:
      real: features of held-out examples, [n, dim].
      drawn: features of drawn examples, [m, dim].
      features: what they are features of.
      seed: of the split of the real examples into halves, and of random subsets.

    Returns:
      Also ``fd_<features>_real_halves``, the same distance between two halves of the real
      examples: what perfect samples would score, and somewhat more, the halves being smaller.
    """
    order = np.random.default_rng(seed).permutation(len(real))
    halves = real[order[::2]], real[order[1::2]]
    kernel, kernel_error = kernel_distance(real, drawn, seed=seed)
    precision, recall = precision_recall(real, drawn)
    return {
        f"fd_{features}": frechet_distance(real, drawn),
        f"fd_{features}_real_halves": frechet_distance(*halves),
        f"kd_{features}": kernel,
        f"kd_{features}_standard_error": kernel_error,
        "precision": precision,
        "recall": recall,
        "num_real": len(real),
        "num_drawn": len(drawn),
    }
