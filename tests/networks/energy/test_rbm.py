"""The functions of the restricted Boltzmann machine against sums over all its states."""

import itertools

import jax
import numpy as np
import pytest

from genai_jax.networks.energy import rbm


def machine(visible: int, hidden: int) -> dict:
    rng = np.random.default_rng(3)
    shapes = {"weights": (visible, hidden), "visible_bias": (visible,), "hidden_bias": (hidden,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def states(count: int) -> np.ndarray:
    return np.array(list(itertools.product((0.0, 1.0), repeat=count)), np.float32)


@pytest.fixture(scope="module")
def small():
    """A machine with 4 x 3 units, and the negative energy of all pairs of states, [16, 8], nats."""
    params, v, h = machine(4, 3), states(4), states(3)
    couplings = v @ params["weights"] @ h.T
    return params, couplings + (v @ params["visible_bias"])[:, None] + h @ params["hidden_bias"]


def test_the_free_energy_sums_over_the_hidden_states(small):
    params, scores = small
    expected = -np.logaddexp.reduce(scores, axis=1)
    np.testing.assert_allclose(rbm.free_energy(params, states(4)), expected, rtol=1e-5, atol=1e-5)


def test_the_conditionals_match_the_joint_distribution(small):
    params, scores = small
    joint = np.exp(scores - scores.max())
    given_v = joint @ states(3) / joint.sum(1, keepdims=True)
    given_h = joint.T @ states(4) / joint.T.sum(1, keepdims=True)
    hidden = jax.nn.sigmoid(rbm.hidden_logits(params, states(4)))
    visible = jax.nn.sigmoid(rbm.visible_logits(params, states(3)))
    np.testing.assert_allclose(hidden, given_v, atol=1e-6)
    np.testing.assert_allclose(visible, given_h, atol=1e-6)


def test_gibbs_repeats_sweeps():
    params, v, key = machine(4, 3), states(4), jax.random.key(0)
    samples, probabilities = jax.jit(rbm.gibbs, static_argnums=3)(params, v, key, 3)
    for rng in jax.random.split(key, 3):
        v, expected = rbm.sweep(params, v, rng)
    np.testing.assert_array_equal(samples, v)
    np.testing.assert_allclose(probabilities, expected, atol=1e-6)


def test_annealing_from_any_base_agrees_with_enumeration_within_its_error_estimate():
    params = machine(10, 6)
    exact = rbm.exact_log_z(params)

    @jax.jit
    def run(base, key):
        return rbm.annealed_log_z(params, base, key, chains=500, temperatures=400)

    for base in (np.zeros(10, np.float32), np.linspace(-2, 2, 10, dtype=np.float32)):
        estimate, error = (float(x) for x in run(base, jax.random.key(2)))
        assert abs(estimate - exact) < min(0.1, 4 * error)


def test_the_error_estimate_of_annealing_is_the_spread_over_independent_draws():
    params, base = machine(10, 6), np.zeros(10, np.float32)
    run = lambda key: rbm.annealed_log_z(params, base, key, chains=100, temperatures=60)
    estimates, errors = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 300))
    assert float(np.std(estimates)) == pytest.approx(float(np.mean(errors)), rel=0.15)
    assert float(np.mean(estimates)) == pytest.approx(float(rbm.exact_log_z(params)), abs=0.02)
