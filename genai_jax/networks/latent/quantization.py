"""Quantization of vectors: learned codebooks, residual stacks of them, and a fixed grid.

A codebook is not trained by gradients: each code follows an exponential moving average of the
vectors that were nearest to it (van den Oord et al. 2017, appendix A.1; Razavi et al. 2019). It
starts by k-means on the first batch, and a code that is hardly used starts anew at a vector of the
batch (Zeghidour et al. 2021, section III-C). Sums go over the whole batch, however it is sharded.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from genai_jax.config import field

KMEANS_ITERATIONS = 10
EXACT = jax.lax.Precision.HIGHEST  # a rounded distance would choose another code


@dataclasses.dataclass(frozen=True)
class QuantizerConfig:
    codes: int = field(512, "vectors in a codebook, of vq and rvq", minimum=2)
    codebooks: int = field(4, "of rvq; each quantizes what the ones before left", minimum=1)
    decay: float = field(0.99, "of the averages that the codes follow", minimum=0, maximum=1)
    restart_below: float = field(
        0.05,
        "a code starts anew if used less than this, relative to even use; 0: never",
        minimum=0,
        maximum=1,
    )
    levels: str = field("8,5,5,5", "values of each latent channel, of fsq")

    def __post_init__(self):
        levels = self.levels.split(",")
        if not all(n.strip().isdigit() and int(n) > 2 for n in levels):
            raise ValueError(f"--quantizer.levels={self.levels} is not a list of numbers from 3 on")
        if math.prod(self.level_counts) > 2**24:
            raise ValueError(f"--quantizer.levels={self.levels} makes more than 2**24 codes")

    @property
    def level_counts(self) -> tuple[int, ...]:
        return tuple(int(n) for n in self.levels.split(","))


class Codebooks(NamedTuple):
    """What is learned of one or several codebooks, float32 but for `started`."""

    vectors: jax.Array  # [codebooks, codes, dim]
    sums: jax.Array  # [codebooks, codes, dim], average of the sum of the vectors of each code
    counts: jax.Array  # [codebooks, codes], average of their number
    started: jax.Array  # [codebooks], bool


class Quantized(NamedTuple):
    """Vectors replaced by codes."""

    vectors: jax.Array  # [..., dim]; their gradient passes straight through to the input
    codes: jax.Array  # [..., codebooks], int32
    commitment: jax.Array  # [...], mean squared distance to the codes, summed over codebooks


def init_codebooks(codebooks: int, codes: int, dim: int) -> Codebooks:
    """Codebooks that start with the first batch they learn from."""
    return Codebooks(
        jnp.zeros((codebooks, codes, dim)),
        jnp.zeros((codebooks, codes, dim)),
        jnp.zeros((codebooks, codes)),
        jnp.zeros((codebooks,), jnp.bool_),
    )


def quantize(books: Codebooks, z: jax.Array) -> Quantized:
    """Each vector of z [..., dim] by the nearest code; what is left, by the next codebook's."""
    return _through(books, z, lambda book, x, index: book)[0]


def quantize_and_learn(
    books: Codebooks, z: jax.Array, rng: jax.Array, *, decay: float, restart_below: float
) -> tuple[Quantized, Codebooks]:
    """As `quantize`; then the codes follow the vectors that they stand for.

    Args:
      books: codebooks; those not started yet start here.
      z: [..., dim].
      rng: key of the vectors at which codes start.
      decay: of the averages.
      restart_below: a code used less than this share of even use starts anew; 0 for never.

    Raises:
      ValueError: fewer vectors in z than a codebook has codes.
    """
    codes, count = books.vectors.shape[1], math.prod(z.shape[:-1])
    if codes > count:
        raise ValueError(f"a codebook of {codes} codes cannot start from {count} vectors")

    def begin(book, x, index):
        fresh = lambda: _started(x, codes, jax.random.fold_in(rng, index))
        return jax.lax.cond(book.started, lambda: book, fresh)

    def follow(book, x, chosen, index):
        counts, sums = totals(x, chosen, codes)
        book = book._replace(
            counts=decay * book.counts + (1 - decay) * counts,
            sums=decay * book.sums + (1 - decay) * sums,
        )
        book = book._replace(vectors=_means(book.sums, book.counts, book.vectors))
        return restarted(book, x, jax.random.fold_in(rng, index + 2**16), restart_below)

    return _through(books, z, begin, follow)


def _through(books, z, begin, follow=lambda book, x, chosen, index: book):
    """Codebook after codebook; `begin` sees one before it quantizes, `follow` after it."""

    def stage(carry, inputs):
        left, total = carry
        book, index = inputs
        x = jax.lax.stop_gradient(left).reshape(-1, z.shape[-1])
        book = begin(book, x, index)
        chosen = nearest(x, book.vectors)
        vectors = book.vectors[chosen].reshape(z.shape)
        distance = jnp.mean(jnp.square(left - vectors), -1)
        book = follow(book, x, chosen, index)
        return (left - vectors, total + vectors), (book, chosen.reshape(z.shape[:-1]), distance)

    books = jax.lax.stop_gradient(books)
    indices = jnp.arange(books.started.size)
    start = (z.astype(jnp.float32), jnp.zeros(z.shape))
    (_, total), (books, codes, distances) = jax.lax.scan(stage, start, (books, indices))
    quantized = straight_through(z, total), jnp.moveaxis(codes, 0, -1), jnp.sum(distances, 0)
    return Quantized(*quantized), books


def straight_through(z: jax.Array, quantized: jax.Array) -> jax.Array:
    """The value of `quantized` with the gradient of `z` (Bengio et al. 2013)."""
    return jax.lax.stop_gradient(quantized) + (z - jax.lax.stop_gradient(z))


def nearest(x: jax.Array, vectors: jax.Array) -> jax.Array:
    """The code nearest to each vector: [count, dim], [codes, dim] -> int32 [count]."""
    products = jnp.matmul(x, vectors.T, precision=EXACT)
    distances = jnp.sum(jnp.square(vectors), -1) - 2 * products  # less |x|^2, equal for all codes
    return jnp.argmin(distances, -1).astype(jnp.int32)


def totals(x: jax.Array, chosen: jax.Array, codes: int) -> tuple[jax.Array, jax.Array]:
    """How many vectors chose each code [codes], and their sum [codes, dim]."""
    one_hot = jax.nn.one_hot(chosen, codes, dtype=jnp.float32)
    return jnp.sum(one_hot, 0), jnp.matmul(one_hot.T, x, precision=EXACT)


def k_means(x: jax.Array, codes: int, rng: jax.Array) -> jax.Array:
    """Lloyd's algorithm from random vectors of x: [count, dim] -> [codes, dim]."""

    def body(vectors, _):
        counts, sums = totals(x, nearest(x, vectors), codes)
        return _means(sums, counts, vectors), None

    first = x[jax.random.choice(rng, x.shape[0], (codes,), replace=False)]
    return jax.lax.scan(body, first, length=KMEANS_ITERATIONS)[0]


def restarted(book: Codebooks, x: jax.Array, rng: jax.Array, below: float) -> Codebooks:
    """Codes that are hardly used start anew at vectors of x, their averages as well.

    Were the averages kept, the next update would put such a code back to where it was.
    """
    even = x.shape[0] / book.counts.shape[-1]
    dead = book.counts < below * even
    fresh = x[jax.random.randint(rng, dead.shape, 0, x.shape[0])]
    wide = dead[:, None]
    return book._replace(
        vectors=jnp.where(wide, fresh, book.vectors),
        sums=jnp.where(wide, even * fresh, book.sums),
        counts=jnp.where(dead, even, book.counts),
    )


def _started(x, codes, rng) -> Codebooks:
    vectors = k_means(x, codes, rng)
    counts, sums = totals(x, nearest(x, vectors), codes)
    return Codebooks(vectors, sums, counts, jnp.bool_(True))


def _means(sums, counts, otherwise):
    """sums / counts; of a code without any use, `otherwise`."""
    used = counts[:, None] > 1e-6
    return jnp.where(used, sums / jnp.where(used, counts[:, None], 1), otherwise)


def finite_scalar(z: jax.Array, levels: Sequence[int]) -> Quantized:
    """Finite scalar quantization (Mentzer et al. 2024, figure 2): each channel to its own grid.

    Args:
      z: [..., channels].
      levels: how many values each channel has.

    Returns:
      Vectors on a grid within [-1, 1]; one code from 0 to prod(levels) - 1; a commitment of 0.
    """
    count = jnp.array(levels, jnp.float32)
    reach = (count - 1) * (1 + 1e-3) / 2
    offset = jnp.where(count % 2 == 0, 0.5, 0.0)
    bounded = jnp.tanh(z + jnp.arctanh(offset / reach)) * reach - offset
    whole = straight_through(bounded, jnp.round(bounded))
    half = count // 2
    places = jnp.array([math.prod(levels[:i]) for i in range(len(levels))], jnp.int32)
    codes = jnp.sum((whole + half).astype(jnp.int32) * places, -1, keepdims=True)
    return Quantized(whole / half, codes, jnp.zeros(z.shape[:-1]))


def to_grid(z: jax.Array, levels: Sequence[int]) -> jax.Array:
    """The nearest vectors that `finite_scalar` gives."""
    count = jnp.array(levels, jnp.float32)
    half = count // 2
    return jnp.clip(jnp.round(z * half), -half, count - 1 - half) / half


def look_up(books: Codebooks, codes: jax.Array) -> jax.Array:
    """Codes [..., codebooks] -> the sums of their vectors [..., dim]."""
    each = [books.vectors[i][codes[..., i]] for i in range(codes.shape[-1])]
    return sum(each[1:], each[0])


def on_grid(codes: jax.Array, levels: Sequence[int]) -> jax.Array:
    """Codes [..., 1] of `finite_scalar` -> its vectors [..., channels]."""
    places = jnp.array([math.prod(levels[:i]) for i in range(len(levels))], jnp.int32)
    count = jnp.array(levels, jnp.int32)
    half = count // 2
    return ((codes // places) % count - half) / half.astype(jnp.float32)


def code_counts(codes: jax.Array, size: int, weights: jax.Array | None = None) -> jax.Array:
    """How often each code occurs, [codebooks, size].

    Args:
      codes: int [batch, ..., codebooks].
      size: codes in a codebook.
      weights: [batch], what an occurrence counts; 1 if None.
    """
    books = codes.shape[-1]
    weights = jnp.ones(codes.shape[0]) if weights is None else weights
    weights = jnp.broadcast_to(weights.reshape(-1, *(1,) * (codes.ndim - 1)), codes.shape)
    places = codes + size * jnp.arange(books)
    return jnp.zeros(books * size).at[places].add(weights).reshape(books, size)


def usage(counts: jax.Array) -> dict[str, jax.Array]:
    """Share of the codes in use, and perplexity exp(entropy) of them, means over codebooks.

    Args:
      counts: [codebooks, codes], how often each code occurred.
    """
    share = counts / jnp.maximum(jnp.sum(counts, -1, keepdims=True), 1)
    entropy = -jnp.sum(share * jnp.log(jnp.maximum(share, 1e-30)), -1)
    return {"usage": jnp.mean(counts > 0), "perplexity": jnp.mean(jnp.exp(entropy))}
