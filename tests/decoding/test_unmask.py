"""Sampling of masked tokens: against a plain implementation, and against an exact distribution."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genai_jax.decoding.unmask import ancestral, mask_predict

MASK, KNOWN, LENGTH = 5, 5, 9
JOINT = np.random.default_rng(3).dirichlet(np.full(16, 0.3)).reshape(4, 4)
INDEPENDENT = np.outer(JOINT.sum(1), JOINT.sum(0))


def logits_of(tokens):
    """Logits that depend on all tokens of a row, and on the place."""
    weights = np.random.default_rng(0).normal(size=(LENGTH, MASK + 1, LENGTH, KNOWN)) * 2
    one_hot = jax.nn.one_hot(tokens, MASK + 1)
    return jnp.einsum("blv,lvmk->bmk", one_hot, jnp.asarray(weights, jnp.float32))


def plain_mask_predict(tokens, steps):
    """Ghazvininejad et al. 2019, section 3.2, for one row, word by word."""
    tokens, free = np.array(tokens), np.flatnonzero(tokens == MASK)
    probability = np.full(LENGTH, np.nan)
    for t in range(steps):
        if t > 0:
            again = len(free) * (steps - t) // steps
            lowest = free[np.argsort(probability[free], kind="stable")[:again]]
            tokens[lowest] = MASK
        p = np.asarray(jax.nn.softmax(logits_of(tokens[None])[0], -1))
        for i in np.flatnonzero(tokens == MASK):
            tokens[i], probability[i] = p[i].argmax(), p[i].max()
    return tokens


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_mask_predict_is_that_of_the_paper(steps):
    tokens = np.full((4, LENGTH), MASK)
    tokens[1, :3], tokens[2, 5], tokens[3] = [1, 0, 2], 4, np.arange(LENGTH) % KNOWN
    rngs = jax.random.split(jax.random.key(0), 4)
    ours = mask_predict(logits_of, jnp.asarray(tokens), MASK, rngs, steps=steps, temperature=0)
    expected = [plain_mask_predict(row, steps) for row in tokens]
    np.testing.assert_array_equal(ours, expected)
    given = tokens != MASK
    np.testing.assert_array_equal(np.asarray(ours)[given], tokens[given])


def test_random_samples_of_a_row_depend_on_its_key_alone():
    tokens = jnp.full((3, LENGTH), MASK)
    rngs = jax.random.split(jax.random.key(1), 3)
    for method in (mask_predict, ancestral):
        fill = functools.partial(method, logits_of, mask_id=MASK, steps=4, temperature=8.0)
        rows = np.asarray(fill(tokens, rngs=rngs))
        np.testing.assert_array_equal(fill(tokens[1:], rngs=rngs[1:]), rows[1:])
        assert (rows != MASK).all() and (rows[0] != rows[1]).any()


def exact_logits(tokens):
    """Of two symbols with distribution `JOINT`, each given the other unless that is a mask (4)."""
    joint = jnp.asarray(JOINT, jnp.float32)
    first = jnp.where((tokens[:, 1] < 4)[:, None], joint.T[tokens[:, 1] % 4], joint.sum(1))
    second = jnp.where((tokens[:, 0] < 4)[:, None], joint[tokens[:, 0] % 4], joint.sum(0))
    return jnp.log(jnp.stack([first, second], 1))


@pytest.mark.parametrize(("steps", "expected"), [(64, JOINT), (1, INDEPENDENT)])
def test_ancestral_samples_have_the_distribution_of_the_model(steps, expected):
    """One token at a time that is the exact one; in one step, symbols are independent."""
    count = 20_000
    rngs = jax.random.split(jax.random.key(2), count)
    fill = jax.jit(lambda rngs: ancestral(exact_logits, jnp.full((count, 2), 4), 4, rngs,
                                          steps=steps))  # fmt: skip
    samples = np.asarray(fill(rngs))
    share = np.bincount(samples @ [4, 1], minlength=16).reshape(4, 4) / count
    variation = lambda p: np.abs(share - p).sum() / 2
    assert variation(expected) < 0.025
    assert max(variation(JOINT), variation(INDEPENDENT)) > 0.2
