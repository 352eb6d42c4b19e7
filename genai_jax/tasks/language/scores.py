"""Held-out metrics of all models that assign a likelihood to text."""

import math

import jax
import jax.numpy as jnp

from genai_jax.config import ConfigError
from genai_jax.tasks.language.data import TextData
from genai_jax.tasks.protocol import Batch, Mean


def text_metrics(
    log_probs: jax.Array, correct: jax.Array, batch: Batch, data: TextData
) -> dict[str, Mean]:
    """Metrics of the rows of a batch, for `summarize_text`.

    Args:
      log_probs: of the targets, [batch, length], nats.
      correct: whether a target was predicted, [batch, length] bool.
      batch: targets, loss_mask, segment_ids, and target_bytes if there are any, with tokens in
        the same order.
      data: that the batch comes from.
    """
    metrics = likelihood_metrics(log_probs, correct, batch, data)
    if data.has_questions:
        metrics["exact_match"] = exact_matches(correct, batch)
    return metrics


def likelihood_metrics(
    log_probs: jax.Array, correct: jax.Array, batch: Batch, data: TextData
) -> dict[str, Mean]:
    """`text_metrics` without those of whole answers; `correct` may be a share in [0, 1]."""
    mask = batch["loss_mask"]
    nll, tokens = -jnp.sum(log_probs * mask, 1), jnp.sum(mask, 1)
    size = jnp.sum(data.target_bytes(batch) * mask, 1)
    return {
        "loss": Mean(nll, tokens),
        "bits_per_byte": Mean(nll / math.log(2), size),
        "accuracy": Mean(jnp.sum(correct * mask, 1), tokens),
    }


def perplexity(loss: float) -> float:
    """exp of a loss in nats per token; infinite where a float cannot hold it."""
    return math.exp(loss) if loss < 709 else math.inf


def exact_matches(correct: jax.Array, batch: Batch) -> Mean:
    """The number of answers with all tokens predicted correctly, out of all answers of a row."""
    mask, (_, length) = batch["loss_mask"], batch["targets"].shape

    def of_row(mask, correct, segments):
        count = lambda x: jax.ops.segment_sum(x, segments, length + 1)
        asked = count(mask) > 0
        exact = asked & (count(mask * (1 - correct)) == 0)
        return jnp.sum(exact, dtype=jnp.float32), jnp.sum(asked, dtype=jnp.float32)

    return Mean(*jax.vmap(of_row)(mask, correct, batch["segment_ids"]))


def summarize_text(reduced: dict[str, Mean], data: TextData) -> dict[str, float]:
    """Loss in nats per token, perplexity, bits per byte, over all targets.

    Bits per byte divides the bits of every target, ends of documents included, by the UTF-8 bytes
    of the text. With --data.answer_after, only answer tokens are scored, and `exact_match` is the
    fraction of answers whose every token is the argmax under teacher forcing. If the targets are
    exactly the pixels of images, it includes bits per dimension.

    Raises:
      ConfigError: there are no targets.
    """
    size, tokens = reduced["bits_per_byte"].weight, reduced["loss"].weight
    if not size:
        raise ConfigError("the held-out data has no text to score")
    metrics = {name: float(x.total / x.weight) for name, x in reduced.items()}
    loss = metrics["loss"]
    summary = {
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": metrics["bits_per_byte"],
        "accuracy": metrics["accuracy"],
        "tokens": int(tokens),
        "bytes": int(size),
    }
    if data.is_values:
        summary["bits_per_dim"] = loss / math.log(2)
    if "exact_match" in reduced:
        answers = int(reduced["exact_match"].weight)
        summary |= {"exact_match": metrics["exact_match"], "answers": answers}
    return summary
