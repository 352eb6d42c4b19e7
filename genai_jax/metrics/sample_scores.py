"""All metrics that compare generated examples with real ones by their features."""

import numpy as np

from genai_jax.metrics.frechet import frechet_distance
from genai_jax.metrics.kernel_distance import kernel_distance
from genai_jax.metrics.precision_recall import precision_recall


def sample_scores(real: np.ndarray, generated: np.ndarray, features: str, seed: int = 0) -> dict:
    """Metrics named after the features: FD-<features> is ``fd_<features>``, never FID.

    Args:
      real: features of held-out examples, [n, dim].
      generated: features of generated examples, [m, dim].
      features: name of the features.
      seed: seed of the split of the real examples into halves.

    Returns:
      The metrics by name. ``fd_<features>_real_halves`` is the Frechet distance between two halves
      of the real examples: slightly more than perfect samples would score, since halves are
      smaller.
    """
    order = np.random.default_rng(seed).permutation(len(real))
    halves = real[order[::2]], real[order[1::2]]
    kernel, kernel_error = kernel_distance(real, generated)
    precision, recall = precision_recall(real, generated)
    return {
        f"fd_{features}": frechet_distance(real, generated),
        f"fd_{features}_real_halves": frechet_distance(*halves),
        f"kd_{features}": kernel,
        f"kd_{features}_standard_error": kernel_error,
        "precision": precision,
        "recall": recall,
        "num_real": len(real),
        "num_drawn": len(generated),
    }
