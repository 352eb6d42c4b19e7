"""Codebooks trained by moving averages, residual stacks of them, and the fixed grid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genai_jax.config import ConfigError, parse
from genai_jax.networks.latent.quantization import (
    Codebooks,
    QuantizerConfig,
    code_counts,
    finite_scalar,
    init_codebooks,
    nearest,
    quantize,
    quantize_and_learn,
    restarted,
    straight_through,
    to_grid,
    usage,
)

LEARN = jax.jit(quantize_and_learn)


def learned(books, z, steps, decay=0.8, restart_below=0.05):
    """Codebooks after `steps` updates on the same batch `z`."""
    for i in range(steps):
        quantized, books = LEARN(
            books, z, jax.random.key(i), decay=decay, restart_below=restart_below
        )
    return quantized, books


def book_of(vectors) -> Codebooks:
    vectors = jnp.asarray(vectors, jnp.float32)[None]
    return Codebooks(vectors, vectors, jnp.ones(vectors.shape[:2]), jnp.array([True]))


def test_gradients_pass_straight_through_and_values_are_exactly_the_codes():
    books = book_of([[0.1, 0.7], [0.9, -0.3]])
    z = jax.random.normal(jax.random.key(0), (5, 3, 2))
    weights = jax.random.normal(jax.random.key(1), z.shape)
    gradient = jax.grad(lambda z: jnp.sum(weights * quantize(books, z).vectors))(z)
    np.testing.assert_array_equal(gradient, weights)
    quantized = quantize(books, z)
    np.testing.assert_array_equal(quantized.vectors, books.vectors[0][quantized.codes[..., 0]])
    direct = jax.grad(lambda z: jnp.sum(weights * straight_through(z, jnp.round(z))))(z)
    np.testing.assert_array_equal(direct, weights)


def test_the_commitment_has_a_gradient_for_the_input_and_none_for_the_codes():
    books = book_of([[0.0, 0.0], [2.0, 2.0]])
    z = jnp.array([[0.5, 0.1], [1.5, 1.8]])
    commitment = lambda books, z: jnp.sum(quantize(books, z).commitment)
    to_books, to_z = jax.grad(commitment, (0, 1), allow_int=True)(books, z)
    codes = jnp.array([[0.0, 0.0], [2.0, 2.0]])
    np.testing.assert_allclose(to_z, z - codes, rtol=1e-6)  # 2 (z - code) / dim
    assert not np.any(to_books.vectors)


def test_the_nearest_code_has_the_smallest_distance():
    x = jax.random.normal(jax.random.key(0), (50, 3))
    vectors = jax.random.normal(jax.random.key(1), (7, 3))
    distances = np.linalg.norm(np.asarray(x)[:, None] - np.asarray(vectors)[None], axis=-1)
    np.testing.assert_array_equal(nearest(x, vectors), distances.argmin(1))


def test_averages_match_the_closed_form():
    """The averages of a code's counts and sums, and their ratio (van den Oord et al. 2017, A.1)."""
    books = book_of([[0.0, 0.0], [4.0, 4.0]])
    z = jnp.array([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0], [0.0, 0.0]])
    _, after = learned(books, z, 1, decay=0.9, restart_below=0.0)
    np.testing.assert_allclose(after.counts[0], [0.9 + 0.1 * 3, 0.9 + 0.1 * 1], rtol=1e-6)
    sums = 0.9 * books.sums[0] + 0.1 * np.array([[1.0, 1.0], [5.0, 5.0]])
    np.testing.assert_allclose(after.sums[0], sums, rtol=1e-6)
    np.testing.assert_allclose(after.vectors[0], sums / after.counts[0][:, None], rtol=1e-6)


def test_the_error_does_not_grow_with_more_codebooks():
    z = jax.random.normal(jax.random.key(0), (64, 4, 3))
    _, books = learned(init_codebooks(4, 16, 3), z, 10)
    errors = []
    for count in range(1, 5):
        first = jax.tree.map(lambda x, n=count: x[:n], books)
        errors.append(float(jnp.mean(jnp.square(quantize(first, z).vectors - z))))
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 10


def clusters() -> np.ndarray:
    """Sixteen tight clusters of very different sizes, [vectors, 2]."""
    rng = np.random.default_rng(0)
    centers = rng.uniform(-10, 10, (16, 2))
    sizes = 4 + 8 * np.arange(16)
    return np.concatenate(
        [c + 0.01 * rng.normal(size=(n, 2)) for c, n in zip(centers, sizes, strict=True)]
    ).astype(np.float32)


def test_no_code_is_dead_after_restarts_on_clustered_data():
    z = jnp.asarray(clusters())
    far = book_of(np.full((16, 2), 100.0) + np.arange(16)[:, None])  # all vectors have one code
    quantized, _ = learned(far, z, 40, restart_below=0.0)
    assert float(usage(code_counts(quantized.codes, 16))["usage"]) < 0.5
    quantized, _ = learned(far, z, 40)
    assert float(usage(code_counts(quantized.codes, 16))["usage"]) == 1.0


def test_codebooks_are_initialized_by_k_means_on_the_first_batch():
    z = jnp.asarray(clusters())
    quantized, books = learned(init_codebooks(1, 16, 2), z, 1)
    assert bool(books.started.all())
    spread = float(jnp.mean(jnp.square(z - z.mean(0))))
    assert float(quantized.commitment.mean()) < 0.2 * spread


def test_a_restart_resets_the_averages_too():
    book = jax.tree.map(lambda x: x[0], book_of([[0.0, 0.0], [9.0, 9.0]]))
    book = book._replace(counts=jnp.array([3.0, 1e-3]), sums=jnp.array([[0.3, 0.3], [1e-2, 1e-2]]))
    x = jax.random.normal(jax.random.key(0), (6, 2))
    after = restarted(book, x, jax.random.key(1), 0.05)
    np.testing.assert_array_equal(after.vectors[0], book.vectors[0])
    np.testing.assert_array_equal(after.sums[0], book.sums[0])
    assert np.any(np.all(np.asarray(x) == np.asarray(after.vectors[1]), -1))
    np.testing.assert_allclose(after.sums[1] / after.counts[1], after.vectors[1], rtol=1e-6)
    assert float(after.counts[1]) == 6 / 2  # as with uniform usage


def test_a_codebook_larger_than_its_first_batch_is_an_error():
    with pytest.raises(ValueError, match="9 codes cannot be initialized from 8 vectors"):
        learned(init_codebooks(1, 9, 2), jnp.zeros((2, 4, 2)), 1)


@pytest.mark.parametrize("levels", [(3,), (4,), (5,), (8,)], ids=str)
def test_the_grid_of_a_channel_matches_its_closed_form(levels):
    (count,) = levels
    quantized = finite_scalar(jnp.linspace(-4, 4, 801)[:, None], levels)
    half = count // 2
    expected = (np.arange(count) - half) / half
    np.testing.assert_allclose(np.unique(quantized.vectors), expected, rtol=1e-6)
    np.testing.assert_array_equal(np.unique(quantized.codes), np.arange(count))
    assert float(finite_scalar(jnp.zeros((1, 1)), levels).vectors[0, 0]) == 0


def test_grid_codes_enumerate_the_points_and_gradients_are_those_of_the_bounded_values():
    levels = (8, 5)
    z = 2 * jax.random.normal(jax.random.key(0), (500, 2))
    quantized = finite_scalar(z, levels)
    whole = np.round(np.asarray(quantized.vectors) * [4, 2])
    np.testing.assert_array_equal(quantized.codes[:, 0], (whole + np.array([4, 2])) @ [1, 8])
    assert int(quantized.codes.max()) < 40 and len(np.unique(quantized.codes)) == 40
    np.testing.assert_array_equal(to_grid(quantized.vectors + 0.1, levels), quantized.vectors)
    gradient = jax.grad(lambda z: jnp.sum(finite_scalar(z, levels).vectors))(z)
    bounded = 1.001 * np.tanh(np.asarray(z[:, 1]))  # five values: no offset, reach 2.002, half 2
    np.testing.assert_allclose(gradient[:, 1], 1.001 - bounded**2 / 1.001, atol=1e-5)


def test_usage_and_perplexity_of_known_counts():
    codes = jnp.array([[0, 1], [0, 1], [1, 1], [1, 3]])
    counts = code_counts(codes, 4, jnp.array([1.0, 1, 1, 0]))
    np.testing.assert_array_equal(counts, [[2, 1, 0, 0], [0, 3, 0, 0]])
    measured = usage(jnp.array([[1.0, 1, 0, 0], [1, 1, 1, 1]]))
    assert float(measured["usage"]) == 0.75
    assert float(measured["perplexity"]) == pytest.approx(3.0)


@pytest.mark.parametrize("levels", ["8,x", "2,5", "", "64,64,64,65"])
def test_invalid_grid_levels_are_errors(levels):
    with pytest.raises(ConfigError, match=f"^--quantizer.levels={levels} "):
        parse([f"--quantizer.levels={levels}"], {"quantizer": QuantizerConfig})
