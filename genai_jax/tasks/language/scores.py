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
    mask, sizes = batch["loss_mask"], data.target_bytes(batch)
    nll, tokens = -jnp.sum(log_probs * mask, 1), jnp.sum(mask, 1)
    bits = lambda of: Mean(
        -jnp.sum(log_probs * mask * of, 1) / math.log(2), jnp.sum(sizes * mask * of, 1)
    )
    metrics = {
        "loss": Mean(nll, tokens),
        "bits_per_byte": bits(1),
        "accuracy": Mean(jnp.sum(correct * mask, 1), tokens),
    }
    for at in data.depths:
        deep = (batch["positions"] >= at) & (batch["positions"] < 2 * at)
        metrics[f"bits_per_byte_after_{at}"] = bits(deep)
    if data.depths:
        metrics[f"bits_per_byte_within_{data.depths[0]}"] = bits(
            batch["positions"] < data.depths[0]
        )
    return metrics


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
    exactly the pixels of images, it includes bits per dimension. With --data.held_out_length, bits
    per byte are also those of tokens by the number N of tokens before them in their document, as
    far as it is in the same row:
    `bits_per_byte_within_L`, N < L, the length of training, and `bits_per_byte_after_M`,
    M <= N < 2 M; where there are none, they are left out.

    Raises:
      ConfigError: there are no targets.
    """
    size, tokens = reduced["bits_per_byte"].weight, reduced["loss"].weight
    if not size:
        raise ConfigError("the held-out data has no text to score")
    metrics = {name: float(x.total / x.weight) for name, x in reduced.items() if x.weight}
    loss = metrics["loss"]
    summary = {
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": metrics["bits_per_byte"],
        "accuracy": metrics["accuracy"],
        "tokens": int(tokens),
        "bytes": int(size),
    }
    summary |= {n: x for n, x in metrics.items() if n.startswith("bits_per_byte_")}
    if data.is_values:
        summary["bits_per_dim"] = loss / math.log(2)
    if "exact_match" in reduced:
        answers = int(reduced["exact_match"].weight)
        summary |= {"exact_match": metrics["exact_match"], "answers": answers}
    return summary
