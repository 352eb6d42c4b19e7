"""The chunked loss is the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genai_jax.losses.token import cross_entropy, token_log_probs, token_scores


def inputs(length=12):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (3, length, 8))
    kernel = jax.random.normal(keys[1], (8, 17))
    targets = jax.random.randint(keys[2], (3, length), 0, 17)
    mask = (jax.random.uniform(keys[3], (3, length)) > 0.3).astype(jnp.float32)
    return hidden, kernel, targets, mask


@pytest.mark.parametrize("chunk_size", [1, 4, 5, 12, 100])
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1}, {"z_loss": 0.1, "soft_cap": 3.0}])
def test_chunked_equals_plain_in_value_and_gradient(chunk_size, options):
    hidden, kernel, targets, mask = inputs()

    def loss(hidden, kernel, size):
        total, *rest = cross_entropy(hidden, kernel, targets, mask, chunk_size=size, **options)
        return 0.5 * total, rest

    gradient = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), static_argnums=2)
    plain, chunked = gradient(hidden, kernel, 0), gradient(hidden, kernel, chunk_size)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(chunked), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)


def test_it_is_the_definition():
    hidden, kernel, targets, mask = inputs()
    log_probabilities = jax.nn.log_softmax(hidden @ kernel, -1)
    chosen = np.take_along_axis(np.asarray(log_probabilities), np.asarray(targets)[..., None], -1)
    loss, nll, right = cross_entropy(hidden, kernel, targets, mask, chunk_size=5)
    assert float(nll) == pytest.approx(-float(np.sum(chosen[..., 0] * mask)), rel=1e-5)
    assert float(loss) == pytest.approx(float(nll))
    best = np.argmax(log_probabilities, -1) == np.asarray(targets)
    assert float(right) == np.sum(best * np.asarray(mask))


def test_masked_targets_have_no_gradient():
    hidden, kernel, targets, mask = inputs()
    gradient = jax.grad(
        lambda h: cross_entropy(h, kernel, targets, mask, z_loss=0.1, chunk_size=4)[0]
    )(hidden)
    norms = np.abs(gradient).sum(-1)
    assert np.all(norms[np.asarray(mask) == 0] == 0) and np.all(norms[np.asarray(mask) == 1] > 0)


def test_no_logits_of_the_whole_batch_in_the_program():
    hidden, kernel, targets, mask = inputs(64)

    def program(size):
        loss = lambda h, w: cross_entropy(h, w, targets, mask, chunk_size=size)[0]
        return jax.jit(jax.grad(loss, (0, 1))).lower(hidden, kernel).compile().as_text()

    assert "[3,64,17]" in program(0) or "[192,17]" in program(0)
    assert "[3,64,17]" not in program(8) and "[192,17]" not in program(8)


@pytest.mark.parametrize("options", [{}, {"soft_cap": 3.0, "chunk_size": 5}])
def test_the_scores_of_single_targets_sum_to_the_cross_entropy_in_value_and_gradient(options):
    hidden, kernel, targets, mask = inputs()
    summed = jax.value_and_grad(
        lambda h, w: cross_entropy(h, w, targets, mask, **options)[0], (0, 1)
    )

    @jax.value_and_grad
    def single(inputs):
        return -jnp.sum(token_log_probs(*inputs, targets, **options) * mask)

    for a, b in zip(
        jax.tree.leaves(summed(hidden, kernel)),
        jax.tree.leaves(single((hidden, kernel))),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)
    scores = token_scores(hidden, kernel, targets, **options)
    assert scores.log_probs.shape == scores.correct.shape == targets.shape
    *_, right = cross_entropy(hidden, kernel, targets, mask, **options)
    assert float(right) == float(jnp.sum(scores.correct * mask))
