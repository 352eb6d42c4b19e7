"""Two vectors for each word, one for what is read and one for what is predicted; and biases."""

import jax
import jax.numpy as jnp

from genai_jax.networks.layers.embedding import lookup
from genai_jax.networks.parallel.axes import split_over

MULTIPLE = 64  # of the rows of a table, so that meshes divide it
# Parameter path -> logical axes.
PARTITION_RULES = (
    (r"(input|output)/vectors", ("vocabulary", "embed")),
    (r"(input|output)/bias", ("vocabulary",)),
)


def table_rows(num_words: int) -> int:
    """Rows of the tables; the last ones belong to no word."""
    return -(-num_words // MULTIPLE) * MULTIPLE


def init(key: jax.Array, num_words: int, dim: int, *, zero_output: bool, bias: bool) -> dict:
    """Parameters {"input": {"vectors": [rows, dim]}, "output": ...}, float32.

    Entries are uniform within half of 1 / dim, as in the programs of Mikolov et al. (2013) and
    Pennington et al. (2014).

    Args:
      key: of the initial vectors.
      num_words: words of the vocabulary.
      dim: width of a vector.
      zero_output: whether the output vectors begin as zeros.
      bias: whether there are biases [rows], which begin as zeros.
    """
    rows, params = table_rows(num_words), {}
    for name, k in zip(("input", "output"), jax.random.split(key), strict=True):
        vectors = jax.random.uniform(k, (rows, dim), jnp.float32, -0.5 / dim, 0.5 / dim)
        if name == "output" and zero_output:
            vectors = jnp.zeros_like(vectors)
        params[name] = {"vectors": vectors} | ({"bias": jnp.zeros(rows)} if bias else {})
    return params


def vectors_of(table: dict, index: jax.Array) -> jax.Array:
    """The vectors of words [batch, n] integers: [batch, n, dim]."""
    vectors = table["vectors"]
    return lookup(vectors, index, split_over("vocabulary", len(vectors)))


def biases_of(table: dict, index: jax.Array) -> jax.Array:
    """The biases of words [batch, n] integers: [batch, n]."""
    return jnp.take(table["bias"], index, axis=0)
