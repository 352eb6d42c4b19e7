"""Next-token cross-entropy without `[batch, length, vocabulary]` logits."""

import math

import jax
from jax.sharding import PartitionSpec

from genai_jax.networks.parallel.axes import STAGE, axis_size, size_one_axes, split_over
from kernels_pallas import linear_cross_entropy


def cross_entropy(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    *,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    chunk_size: int | None = 0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums the loss over the targets; the logits come a chunk of positions at a time.

    Over a mesh each device sums over its own part of batch and length, and cuts its chunks from
    that. The kernel's parts are gathered once, before the first chunk, and its gradient is
    scattered once, behind the last: left to the compiler, either may happen for every chunk.

    Args:
      hidden: [batch, length, embed_dim].
      kernel: output embedding, [embed_dim, vocabulary].
      targets: [batch, length] integers.
      mask: [batch, length] weights of the targets, float32.
      z_loss: weight of the squared log-normalizer (Chowdhery et al. 2022, section 5).
      soft_cap: tanh cap of the logits.
      chunk_size: positions a chunk on each device; 0 takes all at once, None chooses.

    Returns:
      Three float32 numbers: the loss to differentiate, summed over targets; the negative
      log-likelihood in nats alone, summed; the number of targets predicted right.
    """
    batch, length = (split_over(*a) for a in zip(("batch", "length"), targets.shape, strict=True))
    shards = math.prod(axis_size(axis) for axis in (*length, STAGE))
    if axis_size(STAGE) > 1 and targets.shape[1] % shards == 0:  # else each stage makes it all
        length = (*length, STAGE)
    across = (*batch, *length, *size_one_axes())

    def sums(hidden, kernel, targets, mask):
        out = linear_cross_entropy(
            hidden, kernel, targets, weights=mask, z_loss=z_loss,
            logits_soft_cap=soft_cap or None, chunk_size=chunk_size,
        )  # fmt: skip
        return out.loss, out.nll, out.correct

    if not (batch or length):
        return sums(hidden, kernel, targets, mask)
    rows = PartitionSpec((*batch, *size_one_axes()), length or None)
    # The axes that split the vocabulary, if any, are left to the compiler.
    return jax.shard_map(
        lambda x, kernels, *tokens: jax.lax.psum(sums(x, kernels[0], *tokens), across),
        in_specs=(rows, PartitionSpec(across), rows, rows),
        out_specs=PartitionSpec(),
        axis_names={*across},
        check_vma=False,
    )(hidden, _copies(kernel.astype(hidden.dtype), across), targets, mask)


def _copies(kernel: jax.Array, across: tuple[str, ...]) -> jax.Array:
    """[devices of the axes `across`, embed_dim, vocabulary]: each device its own whole copy.

    The gradients of the copies are summed and scattered where they are made, in one go.
    """
    embed = split_over("embed", kernel.shape[0])
    vocabulary = split_over("vocabulary", kernel.shape[1])

    def gather(part):
        return jax.lax.all_gather(part, embed, axis=0, tiled=True)[None] if embed else part[None]

    return jax.shard_map(
        gather,
        in_specs=PartitionSpec(embed or None, vocabulary or None),
        out_specs=PartitionSpec(across, None, vocabulary or None),
        axis_names={*across, *embed, *vocabulary},
        check_vma=False,
    )(kernel)
