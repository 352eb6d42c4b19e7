"""Vector quantization: learned codebooks, residual stacks of them, and a fixed grid.

Codebooks are not trained by gradients: each code is an exponential moving average of the vectors
assigned to it (van den Oord et al. 2017, appendix A.1; Razavi et al. 2019). A codebook is
initialized by k-means on the first batch, and rarely used codes restart at a vector of the batch
(Zeghidour et al. 2021, section III-C). Sums are over the whole batch, however it is sharded.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from genai_jax.config import field

KMEANS_ITERATIONS = 10
EXACT = jax.lax.Precision.HIGHEST  # rounded distances could choose another code


@dataclasses.dataclass(frozen=True)
class QuantizerConfig:
    codes: int = field(512, "Codes per codebook, for vq and rvq.", minimum=2)
    codebooks: int = field(
        4,
        "Number of codebooks, for rvq; each quantizes the residual of the ones before it.",
        minimum=1,
    )
    decay: float = field(
        0.99,
        "Decay rate of the moving averages that the codes follow, for vq and rvq.",
        minimum=0,
        maximum=1,
    )
    restart_below: float = field(
        0.05,
        "Usage below which a code restarts, relative to uniform usage, for vq and rvq; 0: never.",
        minimum=0,
        maximum=1,
    )
    levels: str = field(
        "8,5,5,5", "Number of values of each latent channel, comma-separated, for fsq."
    )

    def __post_init__(self):
        levels = self.levels.split(",")
        if not all(n.strip().isdigit() and int(n) > 2 for n in levels):
            raise ValueError(
                f"levels={self.levels} is not a comma-separated list of integers of at least 3"
            )
        if math.prod(self.level_counts) > 2**24:
            raise ValueError(f"levels={self.levels} gives more than 2**24 codes")

    @property
    def level_counts(self) -> tuple[int, ...]:
        return tuple(int(n) for n in self.levels.split(","))


class Codebooks(NamedTuple):
    """State of one or several codebooks, float32 except for `started`."""

    vectors: jax.Array  # [codebooks, codes, dim]
    sums: jax.Array  # [codebooks, codes, dim], average of the sum of the vectors assigned to a code
    counts: jax.Array  # [codebooks, codes], average of the number of vectors assigned to a code
    started: jax.Array  # [codebooks], bool: whether the codes have been initialized


class Quantized(NamedTuple):
    """Vectors replaced by codes."""

    vectors: jax.Array  # [..., dim]; their gradient passes straight through to the input
    codes: jax.Array  # [..., codebooks], int32
    commitment: jax.Array  # [...], mean squared distance to the codes, summed over codebooks


def init_codebooks(codebooks: int, codes: int, dim: int) -> Codebooks:
    """Codebooks that the first call of `quantize_and_learn` initializes."""
    return Codebooks(
        jnp.zeros((codebooks, codes, dim)),
        jnp.zeros((codebooks, codes, dim)),
        jnp.zeros((codebooks, codes)),
        jnp.zeros((codebooks,), jnp.bool_),
    )


def quantize(books: Codebooks, z: jax.Array) -> Quantized:
    """Replaces each vector of z [..., dim] by its nearest code; the next codebook, its residual."""
    return _quantize_residually(books, z, lambda book, x, index: book)[0]


def quantize_and_learn(
    books: Codebooks, z: jax.Array, rng: jax.Array, *, decay: float, restart_below: float
) -> tuple[Quantized, Codebooks]:
    """Quantizes like `quantize`, then moves the codes towards the vectors assigned to them.

    Args:
      books: codebooks; those not initialized yet are initialized here.
      z: [..., dim].
      rng: key that selects the vectors at which codes start.
      decay: decay rate of the averages.
      restart_below: usage below which a code restarts, relative to uniform usage; 0 for never.

    Raises:
      ValueError: z has fewer vectors than a codebook has codes.
    """
    codes, count = books.vectors.shape[1], math.prod(z.shape[:-1])
    if codes > count:
        raise ValueError(f"a codebook of {codes} codes cannot be initialized from {count} vectors")

    def begin(book, x, index):
        initialize = lambda: _initialized(x, codes, jax.random.fold_in(rng, index))
        return jax.lax.cond(book.started, lambda: book, initialize)

    def follow(book, x, assigned, index):
        counts, sums = totals(x, assigned, codes)
        book = book._replace(
            counts=decay * book.counts + (1 - decay) * counts,
            sums=decay * book.sums + (1 - decay) * sums,
        )
        book = book._replace(vectors=_means(book.sums, book.counts, book.vectors))
        return restarted(book, x, jax.random.fold_in(rng, index + 2**16), restart_below)

    return _quantize_residually(books, z, begin, follow)


def _quantize_residually(books, z, begin, follow=lambda book, x, assigned, index: book):
    """Applies one codebook after another; `begin` updates each before it quantizes, `follow` after.

    Returns:
      What `quantize` returns, and the updated codebooks.
    """

    def stage(carry, inputs):
        residual, total = carry
        book, index = inputs
        x = jax.lax.stop_gradient(residual).reshape(-1, z.shape[-1])
        book = begin(book, x, index)
        assigned = nearest(x, book.vectors)
        vectors = book.vectors[assigned].reshape(z.shape)
        distance = jnp.mean(jnp.square(residual - vectors), -1)
        book = follow(book, x, assigned, index)
        carry = residual - vectors, total + vectors
        return carry, (book, assigned.reshape(z.shape[:-1]), distance)

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
    distances = jnp.sum(jnp.square(vectors), -1) - 2 * products  # |x|^2, equal for all, is left out
    return jnp.argmin(distances, -1).astype(jnp.int32)


def totals(x: jax.Array, assigned: jax.Array, codes: int) -> tuple[jax.Array, jax.Array]:
    """Number [codes] and sum [codes, dim] of the vectors assigned to each code."""
    one_hot = jax.nn.one_hot(assigned, codes, dtype=jnp.float32)
    return jnp.sum(one_hot, 0), jnp.matmul(one_hot.T, x, precision=EXACT)


def k_means(x: jax.Array, codes: int, rng: jax.Array) -> jax.Array:
    """Lloyd's algorithm, starting from random vectors of x: [count, dim] -> [codes, dim]."""

    def body(vectors, _):
        counts, sums = totals(x, nearest(x, vectors), codes)
        return _means(sums, counts, vectors), None

    first = x[jax.random.choice(rng, x.shape[0], (codes,), replace=False)]
    return jax.lax.scan(body, first, length=KMEANS_ITERATIONS)[0]


def restarted(book: Codebooks, x: jax.Array, rng: jax.Array, below: float) -> Codebooks:
    """Restarts rarely used codes, and their averages, at random vectors of x.

    If the averages were kept, the next update would move such a code back to where it was.
    """
    uniform = x.shape[0] / book.counts.shape[-1]
    dead = book.counts < below * uniform
    replacements = x[jax.random.randint(rng, dead.shape, 0, x.shape[0])]
    wide = dead[:, None]
    return book._replace(
        vectors=jnp.where(wide, replacements, book.vectors),
        sums=jnp.where(wide, uniform * replacements, book.sums),
        counts=jnp.where(dead, uniform, book.counts),
    )


def _initialized(x, codes, rng) -> Codebooks:
    """A codebook whose codes are the k-means of x."""
    vectors = k_means(x, codes, rng)
    counts, sums = totals(x, nearest(x, vectors), codes)
    return Codebooks(vectors, sums, counts, jnp.bool_(True))


def _means(sums, counts, default):
    """sums / counts; `default` for codes that are not used."""
    used = counts[:, None] > 1e-6
    return jnp.where(used, sums / jnp.where(used, counts[:, None], 1), default)


def finite_scalar(z: jax.Array, levels: Sequence[int]) -> Quantized:
    """Finite scalar quantization (Mentzer et al. 2024, figure 2): rounds each channel to a grid.

    Args:
      z: [..., channels].
      levels: number of values of each channel.

    Returns:
      Vectors on a grid within [-1, 1]; one code from 0 to prod(levels) - 1; a commitment of 0.
    """
    count = jnp.array(levels, jnp.float32)
    bound = (count - 1) * (1 + 1e-3) / 2
    offset = jnp.where(count % 2 == 0, 0.5, 0.0)
    bounded = jnp.tanh(z + jnp.arctanh(offset / bound)) * bound - offset
    whole = straight_through(bounded, jnp.round(bounded))
    half = count // 2
    places = jnp.array([math.prod(levels[:i]) for i in range(len(levels))], jnp.int32)
    codes = jnp.sum((whole + half).astype(jnp.int32) * places, -1, keepdims=True)
    return Quantized(whole / half, codes, jnp.zeros(z.shape[:-1]))


def to_grid(z: jax.Array, levels: Sequence[int]) -> jax.Array:
    """The vectors on the grid of `finite_scalar` nearest to z [..., channels]."""
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
      size: number of codes in a codebook.
      weights: [batch], weight of each example; 1 if None.
    """
    books = codes.shape[-1]
    weights = jnp.ones(codes.shape[0]) if weights is None else weights
    weights = jnp.broadcast_to(weights.reshape(-1, *(1,) * (codes.ndim - 1)), codes.shape)
    places = codes + size * jnp.arange(books)
    return jnp.zeros(books * size).at[places].add(weights).reshape(books, size)


def usage(counts: jax.Array) -> dict[str, jax.Array]:
    """Fraction of the codes in use, and perplexity of the codes, as means over codebooks.

    Args:
      counts: [codebooks, codes], how often each code occurs.
    """
    share = counts / jnp.maximum(jnp.sum(counts, -1, keepdims=True), 1)
    entropy = -jnp.sum(share * jnp.log(jnp.maximum(share, 1e-30)), -1)
    return {"usage": jnp.mean(counts > 0), "perplexity": jnp.mean(jnp.exp(entropy))}
