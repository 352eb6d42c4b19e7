"""The hidden Markov model against the sum over all paths."""

import itertools

import jax
import numpy as np
import pytest

from genai_jax.networks.statistical import hidden_markov

STATES, TOKENS = 2, 3
# Two sequences in the first row, one and padding in the second: x_0 .. x_T of each.
SEQUENCES = ([0, 1, 2, 1], [2, 0], [0, 2, 2])
BATCH = {
    "tokens": [[0, 1, 2, 2], [0, 2, 0, 0]],
    "targets": [[1, 2, 1, 0], [2, 2, 0, 0]],
    "positions": [[0, 1, 2, 0], [0, 1, 0, 0]],
    "real": [[1, 1, 1, 2], [1, 1, 0, 0]],
}
BATCH = {name: np.array(x, np.int32) for name, x in BATCH.items()}


@pytest.fixture(scope="module")
def params():
    return hidden_markov.init(jax.random.key(3), STATES, TOKENS)


@pytest.fixture(scope="module")
def e_step():
    return jax.jit(hidden_markov.expected_counts)


def paths(params, x):
    """(states, joint probability) of every path through one sequence."""
    p = {name: np.exp(np.asarray(value, np.float64)) for name, value in params.items()}
    for z in itertools.product(range(STATES), repeat=len(x)):
        joint = p["initial"][z[0]] * p["emission"][z[0], x[0]]
        for a, b, token in zip(z, z[1:], x[1:], strict=False):
            joint *= p["transition"][a, b] * p["emission"][b, token]
        yield z, joint


def test_expected_counts_are_the_sums_over_all_paths(params, e_step):
    initial, transition = np.zeros(STATES), np.zeros((STATES, STATES))
    emission, log_likelihood = np.zeros((TOKENS, STATES)), 0.0
    for x in SEQUENCES:
        total = sum(joint for _, joint in paths(params, x))
        log_likelihood += np.log(total)
        for z, joint in paths(params, x):
            initial[z[0]] += joint / total
            for a, b in itertools.pairwise(z):
                transition[a, b] += joint / total
            for state, token in zip(z, x, strict=True):
                emission[token, state] += joint / total
    got = e_step(params, **BATCH)
    assert got.log_likelihood.sum() == pytest.approx(log_likelihood, rel=1e-6)
    assert got.tokens.sum() == sum(map(len, SEQUENCES))
    for a, b in ((got.initial, initial), (got.transition, transition), (got.emission, emission)):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_scores_are_ratios_of_likelihoods(params):
    log_probs, correct = hidden_markov.scores(params, **BATCH)
    likelihood = lambda x: sum(joint for _, joint in paths(params, x))
    x = SEQUENCES[0]
    for t in range(3):
        ratios = [likelihood([*x[: t + 1], w]) / likelihood(x[: t + 1]) for w in range(TOKENS)]
        assert log_probs[0, t] == pytest.approx(np.log(ratios[x[t + 1]]), rel=1e-5)
        assert correct[0, t] == (np.argmax(ratios) == x[t + 1])
    alone = np.log(likelihood([2, 0]) / likelihood([2]))  # begins anew in the same row
    assert log_probs[0, 3] == pytest.approx(alone, rel=1e-5)


def test_the_likelihood_never_falls(e_step):
    rng = np.random.default_rng(0)
    x = np.cumsum(rng.integers(0, 2, (4, 60)), 1) % TOKENS
    batch = {
        "tokens": x[:, :-1], "targets": x[:, 1:], "positions": np.tile(np.arange(59), (4, 1)),
        "real": np.ones((4, 59), np.int32),
    }  # fmt: skip
    params = hidden_markov.init(jax.random.key(0), 3, TOKENS)
    history = []
    for _ in range(60):
        expected = e_step(params, **batch)
        history.append(float(np.sum(np.asarray(expected.log_likelihood, np.float64))))
        params = hidden_markov.maximized(expected)
        for value in params.values():
            np.testing.assert_allclose(np.exp(value).sum(-1), 1, rtol=1e-5)
    assert min(np.diff(history)) > -1e-4 and history[-1] > history[0] + 30


def test_a_long_sequence_does_not_underflow(e_step):
    x = np.zeros((1, 4001), np.int32)
    sharp = {
        "initial": np.log([0.5, 0.5]), "transition": np.log([[1, 1e-30], [1e-30, 1.0]]),
        "emission": np.log(np.array([[1e-6, 0.5, 0.5], [1e-7, 0.5, 0.5]])),
    }  # fmt: skip
    sharp = {name: np.float32(value) for name, value in sharp.items()}
    every = np.ones((1, 4000), np.int32)
    got = e_step(sharp, x[:, :-1], x[:, 1:], np.arange(4000)[None], every)
    assert float(got.log_likelihood[0]) == pytest.approx(np.log(0.5) + 4001 * np.log(1e-6), 1e-5)
    assert float(got.emission[0, 0]) == pytest.approx(4001, rel=1e-4)


def test_smoothing_leaves_no_token_impossible():
    counts = hidden_markov.Expected(
        np.ones(2), np.ones((2, 2)), np.array([[4.0, 0], [0, 0], [0, 0]]), np.zeros(1), np.zeros(1)
    )
    shares = np.exp(hidden_markov.maximized(counts, 3.0)["emission"])
    np.testing.assert_allclose(shares, [[5 / 7, 1 / 7, 1 / 7], [1 / 3] * 3], rtol=1e-6)
