"""Absorbing-state diffusion: the estimate against integrals, and against exact likelihoods."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genai_jax.diffusion.absorbing import random_masks

LENGTH, SYMBOLS = 3, 4
SETS = [s for s in itertools.product((False, True), repeat=LENGTH) if any(s)]


@pytest.fixture(scope="module")
def mean_weights() -> dict[tuple, float]:
    """Mean weight of each set of masks of a row, over a million of rows."""
    rows = 2**20
    masks = jax.jit(random_masks, static_argnums=2)(
        jax.random.key(0), jnp.ones((rows, LENGTH), bool), LENGTH
    )
    code = np.asarray(masks.masked) @ (1 << np.arange(LENGTH))
    weights = np.asarray(masks.weight).max(1)
    total = np.bincount(code, weights, minlength=2**LENGTH) / rows
    return {s: total[np.dot(s, 1 << np.arange(LENGTH))] for s in SETS}


@pytest.fixture(scope="module")
def joint() -> np.ndarray:
    """A distribution of sequences of three of four symbols, far from independent."""
    return (
        np.random.default_rng(0)
        .dirichlet(np.full(SYMBOLS**LENGTH, 0.2))
        .reshape((SYMBOLS,) * LENGTH)
    )


def bounds(nll, mean_weights) -> np.ndarray:
    """The bound of every sequence; nll: (set, position) -> [symbols, symbols, symbols]."""
    return sum(
        weight * nll(s, i) for s, weight in mean_weights.items() for i in range(LENGTH) if s[i]
    )


def test_weights_are_those_of_the_continuous_time_bound(mean_weights):
    t, quadrature = np.polynomial.legendre.leggauss(8)
    t, quadrature = (t + 1) / 2, quadrature / 2
    for s, weight in mean_weights.items():
        m = sum(s)
        integral = np.sum(quadrature * t**m * (1 - t) ** (LENGTH - m) / t)
        assert weight == pytest.approx(integral, rel=1e-2), s


def test_with_exact_posteriors_the_bound_is_the_likelihood(mean_weights, joint):
    def nll(s, i):
        axes = lambda hidden: tuple(j for j in range(LENGTH) if hidden[j])
        others = tuple(x and j != i for j, x in enumerate(s))
        with_it = joint.sum(axes(others), keepdims=True)
        return -np.log(with_it / joint.sum(axes(s), keepdims=True))

    entropy = -np.sum(joint * np.log(joint))
    gap = np.sum(joint * bounds(nll, mean_weights)) - entropy
    assert abs(gap) < 1e-3


def test_of_independent_symbols_the_bound_is_the_entropy(mean_weights):
    p = np.array([0.5, 0.25, 0.2, 0.05])

    def nll(s, i):
        shape = [1] * LENGTH
        shape[i] = SYMBOLS
        return np.broadcast_to(-np.log(p).reshape(shape), (SYMBOLS,) * LENGTH)

    product = np.einsum("i,j,k->ijk", p, p, p)
    bound = np.sum(product * bounds(nll, mean_weights))
    assert bound == pytest.approx(-LENGTH * np.sum(p * np.log(p)), abs=1e-3)


def test_blocks_have_times_of_their_own_and_what_does_not_count_is_never_a_mask():
    counts = np.ones((64, 12), bool)
    counts[:, 5:9], counts[3] = False, False
    masks = random_masks(jax.random.key(1), jnp.asarray(counts), 4)
    masked, weight = np.asarray(masks.masked), np.asarray(masks.weight)
    assert not (masked & ~counts).any() and ((weight > 0) == masked).all()
    # Weights add up to the tokens of the block, whatever the time.
    of_blocks = lambda x: x.reshape(64, 3, 4).sum(-1)
    np.testing.assert_allclose(of_blocks(weight), of_blocks(counts), rtol=1e-6)
    number = of_blocks(masked)[np.arange(64) != 3]
    # Low discrepancy: all numbers of masks come equally often among blocks of four.
    assert np.bincount(number[:, 0])[1:].tolist() == pytest.approx([63 / 4] * 4, abs=6)
    assert (number[:, 1] == 1).all() and set(number[:, 2]) == {1, 2, 3}


def test_times_vary_within_a_row():
    masked = random_masks(jax.random.key(4), jnp.ones((8, 256), bool), 4).masked
    number = np.asarray(masked).reshape(8, 64, 4).sum(-1)
    for row in number:
        assert set(row) == {1, 2, 3, 4}
    # All times together are spread evenly.
    assert np.bincount(number.reshape(-1))[1:].tolist() == pytest.approx([128] * 4, abs=1)


def test_blocks_of_one_token_are_always_masked():
    masks = random_masks(jax.random.key(2), jnp.ones((2, 8), bool), 1)
    assert bool(masks.masked.all()) and bool((masks.weight == 1).all())
