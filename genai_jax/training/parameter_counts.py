"""Number of parameters of a model, in the ways that papers count them."""

import jax

from genai_jax.tasks.protocol import Params
from genai_jax.training.trees import path_name


def parameter_counts(params: Params, inactive: int = 0) -> dict[str, int]:
    """Counts of parameters, or of their shapes.

    Args:
      params: group -> tree.
      inactive: parameters of the experts that a token is not routed to.

    Returns:
      `total`; `embedding`, the lookup tables (without an untied head); `non_embedding`; `active`,
      including embeddings; and the count of each group.
    """
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    total = sum(x.size for _, x in leaves)
    embedding = sum(x.size for path, x in leaves if path_name(path).endswith("embedding"))
    return {
        "total": total,
        "embedding": embedding,
        "non_embedding": total - embedding,
        "active": total - inactive,
        **{group: sum(x.size for x in jax.tree.leaves(p)) for group, p in params.items()},
    }
