"""How often a language model finds a needle in a haystack, by length and depth."""

import re
from collections.abc import Callable, Sequence

import jax
import numpy as np

from genai_jax.config import ConfigError
from genai_jax.data.text.needles import haystacks, words
from genai_jax.errors import printable
from genai_jax.tasks.language.data import TextData
from genai_jax.tasks.protocol import Batch
from genai_jax.training.distributed import to_host

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
CHARACTERS = 100_000  # of made-up hay


def lengths_of(text: str) -> list[int]:
    """The numbers of a flag.

    Raises:
      ValueError: text of another form.
    """
    parts = [part.strip() for part in text.split(",")] if text else []
    if not all(re.fullmatch("[1-9][0-9]{0,5}", part) for part in parts):
        raise ValueError(
            f"needle_lengths={printable(text)} is not a list of numbers of tokens from 1 to "
            "999999, as in 128,512"
        )
    return [int(part) for part in parts]


def needle_scores(
    correct: Callable[[Batch], jax.Array],
    data: TextData,
    lengths: Sequence[int],
    rows: int,
    limit: int | None,
) -> dict[str, float]:
    """The share of needles whose answer is the likeliest text, token by token.

    Args:
      correct: of a batch, which targets are the likeliest tokens, [batch, length].
      data: whose held-out text is the hay, or random words if it has needles itself.
      lengths: of the haystacks, in tokens.
      rows: needles for each length and depth.
      limit: most tokens that the model can read; None for any number.

    Returns:
      `needle/LENGTH/DEPTH`, and `needle/LENGTH`, the mean over depths.

    Raises:
      ConfigError: a length that is too short, or longer than the model can read; tokens that are
        not text.
    """
    check_needles(data, lengths, limit)
    texts = _hay(data, max(lengths, default=0))
    hay = np.concatenate([np.asarray(data.tokenizer.encode(text), np.int32) for text in texts])
    found: dict[str, float] = {}
    for length in lengths:
        shares = []
        for depth in DEPTHS:
            stacks = haystacks(data.tokenizer, hay, length, depth, rows, seed=0)
            positions = np.broadcast_to(np.arange(length, dtype=np.int32), stacks.tokens.shape)
            batch = {
                "tokens": stacks.tokens, "targets": stacks.targets, "positions": positions,
                "segment_ids": np.ones_like(stacks.tokens),
                "loss_mask": stacks.is_answer.astype(np.float32),
            }  # fmt: skip
            right = _in_parts(correct, batch, data.config.batch_size) | ~stacks.is_answer
            shares.append(float(np.mean(np.all(right, 1))))
            found[f"needle/{length}/{depth:g}"] = shares[-1]
        found[f"needle/{length}"] = float(np.mean(shares))
    return found


def _in_parts(correct, batch: Batch, size: int) -> np.ndarray:
    """`correct` of a batch of any number of rows, `size` at a time; the last ones come again."""
    rows = len(batch["tokens"])
    found = []
    for start in range(0, rows, size):
        places = np.minimum(np.arange(start, start + size), rows - 1)
        found.append(to_host(correct({name: a[places] for name, a in batch.items()})))
    return np.concatenate(found)[:rows]


def check_needles(data: TextData, lengths: Sequence[int], limit: int | None):
    """Raises `ConfigError` for tokens that are not text, or lengths that the model cannot read."""
    for length in lengths:
        if limit is not None and length > limit:
            raise ConfigError(f"--needle_lengths={length}: the model reads at most {limit} tokens")
    if lengths and data.config.tokenizer.startswith("numbers:"):
        raise ConfigError(
            f"--needle_lengths: needles are text, which --data.tokenizer={data.tokenizer.spec} "
            "does not read"
        )


def _hay(data: TextData, tokens: int) -> list[str]:
    """Held-out text of about so many tokens, or random words."""
    if data.config.dataset.startswith("needles:"):
        return [words(np.random.default_rng(23), CHARACTERS)]
    texts, size = [], 0
    for index in range(data.loader.held_out_count()):
        texts.append(data.loader.held_out_document(index))
        size += len(texts[-1])
        if size > 20 * tokens:
            break
    if not size:
        raise ConfigError("--needle_lengths: the held-out data has no text to hide needles in")
    return texts
