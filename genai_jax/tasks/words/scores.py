"""Scores of word vectors: analogies, and nearest neighbors against those by held-out contexts."""

import dataclasses
import pathlib

import numpy as np

from genai_jax.config import field
from genai_jax.data.text.analogies import read_analogies
from genai_jax.data.text.word_contexts import cooccurrences
from genai_jax.errors import printable
from genai_jax.files import read_text
from genai_jax.metrics.word_vectors import (
    analogy_answers,
    neighbor_overlap,
    normalized,
    positive_pmi,
)
from genai_jax.requests import ExactEvaluateRequest
from genai_jax.tasks.words.data import WordData

BUILT_IN = pathlib.Path(__file__).parent / "analogies" / "python_docs.txt"
NEIGHBORS = 10  # of each word that are compared
OCCURRENCES = 10  # in held-out documents that a word needs for it
WINDOW = 5  # words on either side that are contexts, whatever the vectors were trained with
MOST_WORDS = 500  # for which neighbors are compared, the most frequent ones


@dataclasses.dataclass(frozen=True)
class AnalogyRequest(ExactEvaluateRequest):
    analogies: str = field(
        "", "File of analogies, four words a line; those for Python's documentation if empty.",
        path=True,
    )  # fmt: skip


def score_vectors(data: WordData, vectors: np.ndarray, request: AnalogyRequest) -> dict:
    """What `evaluate` adds to the held-out loss of `vectors` [words, dim]."""
    label = f"--analogies={printable(request.analogies)}"
    text = read_text(request.analogies, label) if request.analogies else _built_in()
    questions = read_analogies(text, label)
    return _analogies(data, vectors, questions) | _neighbors(data, vectors)


def _built_in() -> str:
    return read_text(BUILT_IN)


def _analogies(data: WordData, vectors: np.ndarray, questions) -> dict:
    """The share of the questions with four known words whose answer is the fourth."""
    known = [q for q in questions if all(word in data.ids for word in q)]
    result = {"analogy_questions": len(known), "analogy_unknown": len(questions) - len(known)}
    if not known:
        return result
    ids = np.array([[data.ids[word] for word in q] for q in known])
    answers = analogy_answers(normalized(vectors), ids)
    right = answers[:, 0] == ids[:, 3] if answers.shape[1] else np.zeros(len(ids))
    return {"analogy_accuracy": float(np.mean(right)), **result}


def _neighbors(data: WordData, vectors: np.ndarray) -> dict:
    """Overlap of the nearest neighbors with those by contexts in the held-out documents.

    Words with at least 10 held-out occurrences, at most the 500 most frequent ones, have as
    contexts their rows of positive pointwise mutual information with words at most 5 away. Of each
    word, the share of its 10 nearest among them by vectors that are among its 10 nearest by
    contexts is averaged; by chance it is 10 / (words - 1).
    """
    corpus, total = data.corpus("validation"), len(data.vocabulary.words)
    counts = np.bincount(corpus.ids, minlength=total)
    order = np.argsort(-counts, kind="stable")[:MOST_WORDS]
    words = order[counts[order] >= OCCURRENCES]
    if len(words) <= NEIGHBORS + 1:
        return {"neighbor_words": len(words)}
    contexts = positive_pmi(cooccurrences(corpus, total, WINDOW), words, total)
    return {
        "neighbor_overlap": neighbor_overlap(vectors[words], contexts, NEIGHBORS),
        "neighbor_overlap_by_chance": NEIGHBORS / (len(words) - 1),
        "neighbor_words": len(words),
    }
