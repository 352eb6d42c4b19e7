"""Next-token cross-entropy without `[batch, length, vocabulary]` logits."""

import jax

from kernels_pallas import linear_cross_entropy


def cross_entropy(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    *,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    chunk_size: int = 0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums the loss over the targets; the logits come a chunk of positions at a time.

    Args:
      hidden: [batch, length, embed_dim].
      kernel: output embedding, [embed_dim, vocabulary].
      targets: [batch, length] integers.
      mask: [batch, length] weights of the targets, float32.
      z_loss: weight of the squared log-normalizer (Chowdhery et al. 2022, section 5).
      soft_cap: tanh cap of the logits.
      chunk_size: positions a chunk; 0 takes all at once.

    Returns:
      Three float32 numbers: the loss to differentiate, summed over targets; the negative
      log-likelihood in nats alone, summed; the number of targets predicted right.
    """
    out = linear_cross_entropy(
        hidden,
        kernel,
        targets,
        weights=mask,
        z_loss=z_loss,
        logits_soft_cap=soft_cap or None,
        chunk_size=chunk_size,
    )
    return out.loss, out.nll, out.correct
