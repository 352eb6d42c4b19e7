"""How models of text predict tokens: flags, and the loss of a step."""

import dataclasses

import jax
import jax.numpy as jnp

from genai_jax.config import field
from genai_jax.losses.token import cross_entropy
from genai_jax.tasks.protocol import Batch, LossOutput, PyTree


@dataclasses.dataclass(frozen=True)
class OutputConfig:
    """How a model of text predicts tokens."""

    z_loss: float = field(0.0, "Weight of the squared log-normalizer.", minimum=0)
    loss_chunk: int | None = field(
        None,
        "Positions per device whose logits exist at once; 0: all; chosen automatically if unset.",
        minimum=0,
    )
    vocab_size: int | None = field(
        None,
        "Rows of the embeddings, at least the vocabulary of the tokenizer; its size if unset.",
        minimum=1,
    )


def token_loss(
    hidden: jax.Array,
    kernel: jax.Array,
    batch: Batch,
    weights: jax.Array,
    own: OutputConfig,
    soft_cap: float | None,
    mutables: PyTree,
    count: jax.Array | None = None,
    router: tuple = (0.0, {}),
) -> LossOutput:
    """The mean cross-entropy of the targets of a batch, with `nll` and `accuracy` as metrics.

    Args:
      hidden: [batch, length, embed_dim].
      kernel: [embed_dim, vocab_size].
      batch: with `targets`, [batch, length].
      weights: of the targets, [batch, length].
      own: weight of the log-normalizer, and how many logits exist at once.
      soft_cap: of the logits.
      mutables: of the task, unchanged.
      count: what the sums are divided by, and how much the batch weighs; the weights if None.
      router: what `losses.router.router_terms` returned.
    """
    loss, nll, correct = cross_entropy(
        hidden, kernel, batch["targets"], weights, z_loss=own.z_loss, soft_cap=soft_cap,
        chunk_size=own.loss_chunk,
    )  # fmt: skip
    weight = jnp.sum(weights) if count is None else count
    count = jnp.maximum(weight, 1)
    metrics = {"nll": nll / count, "accuracy": correct / count}
    return LossOutput(loss / count + router[0], metrics | router[1], mutables, weight)
