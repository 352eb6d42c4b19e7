"""Next-token log-probabilities and cross-entropy without `[batch, length, vocabulary]` logits.

On a mesh each device scores its own part of batch and length, and cuts its chunks from that. The
kernel's parts are gathered once, before the first chunk, and its gradient is scattered once, after
the last: left to the compiler, either may happen for every chunk.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.sharding import PartitionSpec

from genai_jax.networks.parallel.axes import STAGE, axis_size, size_one_axes, split_over
from kernels_pallas import linear_cross_entropy


class TokenScores(NamedTuple):
    """Of each target, [batch, length]."""

    log_probs: jax.Array  # float32, nats
    correct: jax.Array  # bool: whether no logit is above the target's


def token_scores(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    *,
    soft_cap: float | None = None,
    chunk_size: int | None = None,
) -> TokenScores:
    """The log-probability of each target, and whether it is the likeliest token.

    Differentiable in `hidden` and `kernel`; arguments as those of `cross_entropy`.
    """

    def score(hidden, kernel, targets):
        each = linear_cross_entropy(
            hidden, kernel, targets, logits_soft_cap=soft_cap or None, chunk_size=chunk_size
        )
        return TokenScores(-each.nll, each.correct)

    return _over_mesh(score, hidden, kernel, (targets,), summed=False)


def token_log_probs(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, **options
) -> jax.Array:
    """The log-probability of each target, [batch, length], float32 nats: see `token_scores`."""
    return token_scores(hidden, kernel, targets, **options).log_probs


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
    """Sums over the targets.

    It equals the sum of `token_log_probs` times `mask`; since the weights are known beforehand, the
    gradient is computed along with the loss, which saves one matmul of four.

    Args:
      hidden: [batch, length, embed_dim].
      kernel: output embedding, [embed_dim, vocabulary].
      targets: [batch, length] integers.
      mask: [batch, length] weights of the targets, float32.
      z_loss: weight of the squared log-normalizer (Chowdhery et al. 2022, section 5).
      soft_cap: tanh cap of the logits.
      chunk_size: positions per chunk on each device; 0 takes all at once, None chooses.

    Returns:
      Three float32 scalars: the loss to differentiate; the negative log-likelihood in nats, without
      the z-loss; the number of targets predicted correctly.
    """

    def sums(hidden, kernel, targets, mask):
        out = linear_cross_entropy(
            hidden, kernel, targets, weights=mask, z_loss=z_loss,
            logits_soft_cap=soft_cap or None, chunk_size=chunk_size,
        )  # fmt: skip
        return out.loss, out.nll, out.correct

    return _over_mesh(sums, hidden, kernel, (targets, mask), summed=True)


def _over_mesh(function: Callable, hidden, kernel, tokens: tuple, *, summed: bool):
    """`function(hidden, kernel, *tokens)` with each device of the mesh on its own targets.

    Args:
      function: of one device's part; returns sums over its targets, or arrays [batch, length].
      tokens: arrays [batch, length].
      summed: whether it returns sums, to be added up over devices.
    """
    shape = tokens[0].shape
    batch, length = (split_over(*a) for a in zip(("batch", "length"), shape, strict=True))
    shards = math.prod(axis_size(axis) for axis in (*length, STAGE))
    if axis_size(STAGE) > 1 and shape[1] % shards == 0:  # else each stage computes all of it
        length = (*length, STAGE)
    across = (*batch, *length, *size_one_axes())
    if not (batch or length):
        return function(hidden, kernel, *tokens)
    rows = PartitionSpec((*batch, *size_one_axes()), length or None)

    def part(x, kernels, *tokens):
        out = function(x, kernels[0], *tokens)
        return jax.lax.psum(out, across) if summed else out

    # The axes that split the vocabulary, if any, are left to the compiler.
    return jax.shard_map(
        part,
        in_specs=(rows, PartitionSpec(across), *(rows for _ in tokens)),
        out_specs=PartitionSpec() if summed else rows,
        axis_names={*across},
        check_vma=False,
    )(hidden, _copies(kernel.astype(hidden.dtype), across), *tokens)


def _copies(kernel: jax.Array, across: tuple[str, ...]) -> jax.Array:
    """[devices of the axes `across`, embed_dim, vocabulary]: a whole copy for each device.

    The gradients of the copies are summed and scattered where they are computed, in one go.
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
