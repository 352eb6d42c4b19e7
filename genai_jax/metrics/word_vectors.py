"""Neighbors, analogies, and a projection of word vectors; on the host."""

from collections.abc import Sequence

import numpy as np

from genai_jax.data.text.word_contexts import Cells

AT_ONCE = 1 << 24  # similarities computed at a time


def normalized(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1, float32; zeros stay zeros."""
    vectors = np.asarray(vectors, np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths, lengths, 1)


def nearest(
    vectors: np.ndarray, queries: np.ndarray, count: int, left_out: Sequence[Sequence[int]]
) -> tuple[np.ndarray, np.ndarray]:
    """The rows of largest cosine to each query, the nearest first.

    Args:
      vectors: [words, dim], normalized.
      queries: [n, dim], of any length.
      count: how many rows; fewer if there are not so many.
      left_out: of each query, rows that are not taken, the same number for all.

    Returns:
      indices [n, count] and cosines [n, count].
    """
    queries, left_out = normalized(queries), np.asarray(left_out, np.int64)
    count = max(0, min(count, len(vectors) - left_out.shape[1]))
    step, parts = max(1, AT_ONCE // len(vectors)), []
    for start in range(0, len(queries), step):
        cosines = queries[start : start + step] @ vectors.T
        np.put_along_axis(cosines, left_out[start : start + step], -np.inf, 1)
        order = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
        parts.append((order, np.take_along_axis(cosines, order, 1)))
    return tuple(np.concatenate(part) for part in zip(*parts, strict=True))


def analogy_queries(vectors: np.ndarray, questions: np.ndarray) -> np.ndarray:
    """b - a + c of normalized vectors, [n, dim], for questions of at least a, b, c [n, 3].

    Mikolov, Yih, and Zweig 2013, "Linguistic regularities in continuous space word
    representations", section 4.
    """
    a, b, c = questions.T[:3]
    return vectors[b] - vectors[a] + vectors[c]


def analogy_answers(vectors: np.ndarray, questions: np.ndarray, count: int = 1) -> np.ndarray:
    """The words nearest to `analogy_queries`, without a, b, and c: indices [n, count]."""
    queries = analogy_queries(vectors, questions)
    return nearest(vectors, queries, count, questions[:, :3])[0]


def positive_pmi(cells: Cells, words: np.ndarray, num_words: int) -> np.ndarray:
    """Rows of the matrix of positive pointwise mutual information, [words, num_words].

    max(0, log(x_ij x / (x_i x_j))) of counts x_ij and their sums over rows, columns, and both
    (Church and Hanks 1990; Levy and Goldberg 2014).

    Args:
      cells: the co-occurrence counts.
      words: the rows that are wanted.
      num_words: words of the vocabulary.
    """
    of_row = np.bincount(cells.rows, cells.counts, num_words)
    of_column = np.bincount(cells.columns, cells.counts, num_words)
    places = np.full(num_words, -1)
    places[words] = np.arange(len(words))
    wanted = places[cells.rows] >= 0
    rows, columns, counts = (x[wanted] for x in cells)
    information = np.log(counts * of_row.sum() / (of_row[rows] * of_column[columns]))
    table = np.zeros((len(words), num_words), np.float32)
    table[places[rows], columns] = np.maximum(information, 0)
    return table


def neighbor_overlap(one: np.ndarray, other: np.ndarray, count: int) -> float:
    """Share of the `count` nearest neighbors of a row that it has in both tables, over all rows.

    Args:
      one, other: vectors of the same words, [words, *]; neighbors are by cosine.
      count: fewer than there are words.
    """
    itself = np.arange(len(one))[:, None]
    sides = [nearest(normalized(x), x, count, itself)[0] for x in (one, other)]
    common = [len({*a} & {*b}) for a, b in zip(*map(np.ndarray.tolist, sides), strict=True)]
    return float(np.mean(common) / count)


def principal_components(vectors: np.ndarray) -> np.ndarray:
    """Coordinates along the two directions of largest variance, [n, 2].

    The sign is such that the largest coordinate of each direction is positive.
    """
    centered = np.asarray(vectors, np.float64) - np.mean(vectors, 0)
    u, s, _ = np.linalg.svd(centered, full_matrices=False)
    points = np.zeros((len(vectors), 2))
    kept = min(2, len(s))
    points[:, :kept] = (u * s)[:, :kept]
    largest = np.take_along_axis(points, np.abs(points).argmax(0)[None], 0)
    return points * np.where(largest < 0, -1, 1)
