"""Words of a text source: how text is split, the vocabulary by frequency, and documents as ids."""

import collections
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

# Letters and digits, with apostrophes inside; at least one letter, and no underscores.
_WORD = re.compile(r"\d*[^\W\d_][^\W_]*(?:['\u2019][^\W_]+)*")


class Vocabulary(NamedTuple):
    """Distinct words, the most frequent first.

    Attributes:
      words: of each id.
      counts: how often each occurs in the training documents, [words] int64.
    """

    words: tuple[str, ...]
    counts: np.ndarray


class Corpus(NamedTuple):
    """Words of documents as ids, without those that are not in the vocabulary.

    Attributes:
      ids: [length] int32.
      documents: index of the document that each belongs to, [length] int32, ascending.
    """

    ids: np.ndarray
    documents: np.ndarray

    def kept(self, mask: np.ndarray) -> "Corpus":
        """The words where the mask [length] is true, closed up."""
        return Corpus(self.ids[mask], self.documents[mask])


def split_words(text: str) -> list[str]:
    """The words of a text in lower case: runs of letters, digits, and inner apostrophes.

    A word has at least one letter, so that numbers are none; underscores and dots end a word.
    """
    return [word.replace("\u2019", "'") for word in _WORD.findall(text.lower())]


def count_words(texts: Iterable[str], min_count: int, max_words: int | None) -> Vocabulary:
    """The words that occur at least `min_count` times, at most `max_words` of them.

    Words of the same count are in alphabetical order.
    """
    counts = collections.Counter()
    for text in texts:
        counts.update(split_words(text))
    frequent = [(word, n) for word, n in counts.items() if n >= min_count]
    frequent.sort(key=lambda entry: (-entry[1], entry[0]))
    frequent = frequent[:max_words]
    words = tuple(word for word, _ in frequent)
    return Vocabulary(words, np.array([n for _, n in frequent], np.int64))


def as_ids(texts: Iterable[str], words: Sequence[str]) -> Corpus:
    """The known words of texts."""
    ids = {word: i for i, word in enumerate(words)}
    parts = [
        np.array([ids[word] for word in split_words(text) if word in ids], np.int32)
        for text in texts
    ]
    lengths = [len(part) for part in parts]
    documents = np.repeat(np.arange(len(parts), dtype=np.int32), lengths)
    return Corpus(np.concatenate([np.zeros(0, np.int32), *parts]), documents)


def keep_probability(counts: np.ndarray, threshold: float) -> np.ndarray:
    """Probability that an occurrence of each word stays in the text, [words] float64.

    min(1, sqrt(t / f)) for a word whose share of all occurrences is f (Mikolov et al. 2013,
    "Distributed representations of words and phrases and their compositionality", eq. 5); 1 for a
    threshold of 0.
    """
    if not threshold:
        return np.ones(len(counts))
    share = counts / counts.sum()
    return np.minimum(1, np.sqrt(threshold / np.maximum(share, 1e-300)))


def noise_distribution(counts: np.ndarray, power: float) -> np.ndarray:
    """Probability of each word as a negative sample: its count to a power (same paper, 2.2)."""
    weights = counts.astype(np.float64) ** power
    return weights / weights.sum()
