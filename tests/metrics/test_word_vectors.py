"""Scores of word vectors on vectors whose neighbors and analogies are known."""

import numpy as np
import pytest

from genai_jax.data.text.word_contexts import Cells
from genai_jax.metrics.word_vectors import (
    analogy_answers,
    nearest,
    neighbor_overlap,
    normalized,
    positive_pmi,
    principal_components,
)

RNG = np.random.default_rng(0)


def test_analogies_are_solved_exactly():
    """Each vector is the sum of a stem and a form, as in "king - man + woman = queen"."""
    stems, forms = np.eye(4, 6), np.eye(2, 6, 4)
    vectors = normalized((stems[:, None] + forms).reshape(8, 6))
    questions = [(2 * i, 2 * i + 1, 2 * j, 2 * j + 1) for i in range(4) for j in range(4) if i != j]
    questions = np.array(questions)
    np.testing.assert_array_equal(analogy_answers(vectors, questions)[:, 0], questions[:, 3])
    assert analogy_answers(vectors, questions, 100).shape == (12, 5)  # all but the three asked for


def test_nearest_is_by_cosine():
    vectors = RNG.normal(size=(9, 3)) * RNG.uniform(1, 9, (9, 1))
    indices, cosines = nearest(normalized(vectors), vectors[:4], 3, np.arange(4)[:, None])
    for i in range(4):
        exact = vectors @ vectors[i] / np.linalg.norm(vectors, axis=1) / np.linalg.norm(vectors[i])
        order = [j for j in np.argsort(-exact) if j != i][:3]
        assert indices[i].tolist() == order
        np.testing.assert_allclose(cosines[i], exact[order], rtol=1e-5)


def test_overlap():
    one = RNG.normal(size=(40, 5))
    rotation = np.linalg.qr(RNG.normal(size=(5, 5)))[0]
    assert neighbor_overlap(one, 3 * one @ rotation, 10) == 1
    chance = np.mean([neighbor_overlap(one, RNG.normal(size=(40, 5)), 10) for _ in range(30)])
    assert chance == pytest.approx(10 / 39, abs=0.03)


def test_positive_pmi_is_its_definition():
    counts = RNG.poisson(2.0, (5, 5)).astype(np.float32)
    rows, columns = np.nonzero(counts)
    words = np.array([3, 0])
    cells = Cells(rows, columns, counts[rows, columns])
    with np.errstate(divide="ignore"):
        ratio = counts * counts.sum() / np.outer(counts.sum(1), counts.sum(0))
        expected = np.maximum(np.log(ratio), 0)
    np.testing.assert_allclose(positive_pmi(cells, words, 5), expected[words], rtol=1e-5)


def test_the_projection_keeps_a_plane():
    plane = RNG.normal(size=(20, 2)) * [5, 1]
    points = principal_components(plane @ np.linalg.qr(RNG.normal(size=(4, 4)))[0][:2] + 3)
    distances = lambda x: np.linalg.norm(x[:, None] - x, axis=-1)
    np.testing.assert_allclose(distances(points), distances(plane), atol=1e-9)
    assert principal_components(np.ones((1, 3))).tolist() == [[0, 0]]
