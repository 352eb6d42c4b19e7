"""Which tokens top-k and top-p leave, on worked examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genai_jax.decoding.filters import filter_logits, sample_tokens


def support(probabilities, **options) -> list[int]:
    logits = filter_logits(jnp.log(jnp.array([probabilities])), **options)[0]
    return [int(i) for i in np.flatnonzero(np.isfinite(logits))]


@pytest.mark.parametrize(
    ("probabilities", "top_p", "kept"),
    [
        ((0.5, 0.25, 0.25), 0.5, [0]),
        ((0.25, 0.25, 0.25, 0.25), 0.6, [0, 1, 2]),
        ((0.5, 0.3, 0.2), 0.7, [0, 1]),
        ((0.2, 0.5, 0.3), 0.7, [1, 2]),
        ((0.5, 0.3, 0.2), 0.81, [0, 1, 2]),
        ((0.6, 0.3, 0.1), 0.0, [0]),
        ((0.6, 0.3, 0.1), 1.0, [0, 1, 2]),
    ],
)
def test_top_p_is_the_smallest_set_that_reaches_p(probabilities, top_p, kept):
    assert support(probabilities, top_p=top_p) == kept


@pytest.mark.parametrize(
    ("probabilities", "top_k", "kept"),
    [
        ((0.1, 0.6, 0.3), 1, [1]),
        ((0.1, 0.6, 0.3), 2, [1, 2]),
        ((0.25, 0.25, 0.25, 0.25), 2, [0, 1]),
        ((0.1, 0.6, 0.3), 0, [0, 1, 2]),
        ((0.1, 0.6, 0.3), 9, [0, 1, 2]),
    ],
)
def test_top_k_keeps_exactly_k(probabilities, top_k, kept):
    assert support(probabilities, top_k=top_k) == kept


def test_top_p_counts_the_mass_that_top_k_left():
    # Of the two likeliest, 0.4 / 0.7 alone reaches 0.55.
    assert support((0.4, 0.3, 0.2, 0.1), top_k=2, top_p=0.55) == [0]
    assert support((0.4, 0.3, 0.2, 0.1), top_p=0.55) == [0, 1]


def test_kept_logits_are_untouched():
    logits = jax.random.normal(jax.random.key(0), (5, 9))
    kept = filter_logits(logits, top_k=4, top_p=0.9)
    np.testing.assert_array_equal(kept, np.where(np.isfinite(kept), logits, -np.inf))


def test_draws_follow_the_distribution():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.2]))
    rngs = jax.random.split(jax.random.key(0), 4000)
    rows = jnp.broadcast_to(logits, (4000, 3))
    shares = np.bincount(sample_tokens(rngs, rows, 1.0, 0, 1.0), minlength=3) / 4000
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.2], atol=0.03)
    shares = np.bincount(sample_tokens(rngs, rows, 1.0, 2, 1.0), minlength=3) / 4000
    np.testing.assert_allclose(shares, [0.625, 0.375, 0], atol=0.03)
    assert np.all(sample_tokens(rngs, rows, 0, 0, 1.0) == 0)
