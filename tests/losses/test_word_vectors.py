"""Losses of word vectors against loops in float64, and in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genai_jax.losses.word_vectors import (
    cooccurrence_weight,
    expected_noise,
    log_count_residual,
    negative_sampling,
)

WORDS, DIM, PAIRS, NEGATIVES = 6, 4, 5, 3
RNG = np.random.default_rng(0)
INPUT, OUTPUT = (RNG.normal(size=(WORDS, DIM)) for _ in range(2))
CENTERS, CONTEXTS = (RNG.integers(0, WORDS, PAIRS) for _ in range(2))
NOISE = RNG.integers(0, WORDS, (PAIRS, NEGATIVES))


def of_tables(tables):
    vectors, contexts = tables
    return jnp.sum(negative_sampling(vectors[CENTERS], contexts[CONTEXTS], contexts[NOISE]))


def by_loop():
    """Sum of the losses of all pairs, and its gradients by both tables, word2vec's way."""
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    total, by_input, by_output = 0.0, np.zeros_like(INPUT), np.zeros_like(OUTPUT)
    for center, context, noise in zip(CENTERS, CONTEXTS, NOISE, strict=True):
        for word, label in [(context, 1), *((k, 0) for k in noise)]:
            p = sigmoid(OUTPUT[word] @ INPUT[center])
            total -= np.log(p if label else 1 - p)
            by_input[center] += (p - label) * OUTPUT[word]
            by_output[word] += (p - label) * INPUT[center]
    return total, by_input, by_output


def test_negative_sampling_and_its_gradients_equal_a_loop():
    tables = tuple(jnp.asarray(x, jnp.float32) for x in (INPUT, OUTPUT))
    loss, gradients = jax.jit(jax.value_and_grad(of_tables))(tables)
    expected, *by_tables = by_loop()
    assert loss == pytest.approx(expected, rel=1e-5)
    for gradient, by_table in zip(gradients, by_tables, strict=True):
        np.testing.assert_allclose(gradient, by_table, atol=1e-5)


def test_the_expectation_is_the_mean_over_the_noise():
    noise = RNG.dirichlet(np.ones(WORDS))
    terms = np.log1p(np.exp(INPUT @ OUTPUT.T))
    expected = expected_noise(*(jnp.asarray(x, jnp.float32) for x in (INPUT, OUTPUT, noise)))
    np.testing.assert_allclose(expected, terms @ noise, rtol=1e-5)


def test_the_weight_of_counts():
    counts = jnp.array([1.0, 50.0, 100.0, 1e6])
    weights = cooccurrence_weight(counts, 100.0, 0.75)
    np.testing.assert_allclose(weights, [100**-0.75, 0.5**0.75, 1, 1], rtol=1e-6)


def test_glove_fits_a_matrix_of_its_own_rank():
    """log X = b_i + c_j + w_i . v_j of rank 1 is fitted exactly: the minimum is 0."""
    u, v = RNG.normal(size=(2, WORDS))
    counts = jnp.asarray(np.exp(1 + np.outer(u, v) / 2 + u[:, None]), jnp.float32)
    weights = cooccurrence_weight(counts, 3.0, 0.75)

    def loss(params):
        w, c, a, b = params
        pairs = [jnp.repeat(w, WORDS, 0), jnp.tile(c, (WORDS, 1))]
        biases = (a[:, None] + b).reshape(-1)
        residual = log_count_residual(*pairs, biases, counts.reshape(-1))
        return jnp.sum(weights.reshape(-1) * residual**2)

    start = RNG.normal(size=(2, WORDS, 1)) / 2
    params = [jnp.asarray(x) for x in (*start, np.zeros(WORDS), np.zeros(WORDS))]

    @jax.jit
    def descend(params):
        step = lambda _, p: jax.tree.map(lambda x, g: x - 0.03 * g, p, jax.grad(loss)(p))
        return jax.lax.fori_loop(0, 4000, step, params)

    assert loss(params) > 1
    assert loss(descend(params)) < 1e-4
