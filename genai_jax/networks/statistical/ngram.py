"""An n-gram model as arrays: tables that are searched, and the distributions that they give.

The tables of an order are {"token" and "start": its contexts, "word", "mass", "first", "backoff"}.
A context is found from the one without its oldest token: its children are
token[start[parent] : start[parent + 1]], in ascending order. The n-grams of a context are
word[first[context] : first[context + 1]], likewise. The first order has one, empty context. All
arrays are padded to sizes that do not depend on the data.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from genai_jax.networks.statistical.ngram_smoothing import Smoothed

CHUNK = 1 << 16  # probabilities that exist at once: few enough for the cache of a CPU
Tables = Mapping[str, Mapping[str, jax.Array]]


def order_name(order: int) -> str:
    return f"order_{order}"


def sizes(order: int, vocab_size: int, limit: int) -> tuple[int, int]:
    """Contexts and n-grams of one order for which the tables have room; `limit` if need be."""
    return min(vocab_size ** (order - 1), limit), min(vocab_size**order, limit)


def empty_tables(order: int, vocab_size: int, limit: int) -> dict[str, dict[str, jax.Array]]:
    """Tables of the orders 1 .. `order` without any n-gram: every distribution is uniform."""
    tables = {}
    for k in range(1, order + 1):
        contexts, entries = sizes(k, vocab_size, limit)
        table = {
            "word": jnp.zeros(entries, jnp.int32),
            "mass": jnp.zeros(entries),
            "first": jnp.zeros(contexts + 1, jnp.int32),
            "backoff": jnp.ones(contexts),
        }
        if k > 1:
            parents, _ = sizes(k - 1, vocab_size, limit)
            table["token"] = jnp.zeros(contexts, jnp.int32)
            table["start"] = jnp.zeros(parents + 1, jnp.int32)
        tables[order_name(k)] = table
    return tables


def filled_tables(
    model: Sequence[Smoothed], vocab_size: int, limit: int
) -> dict[str, dict[str, np.ndarray]]:
    """The model in the shapes of `empty_tables`; no order may have more than `limit` n-grams."""
    tables = {}
    for k, level in enumerate(model, 1):
        contexts, entries = sizes(k, vocab_size, limit)
        table = {
            "word": _padded(level.words, entries, 0, np.int32),
            "mass": _padded(level.mass, entries, 0, np.float32),
            "first": _padded(level.first, contexts + 1, len(level.words), np.int32),
            "backoff": _padded(level.backoff, contexts, 1, np.float32),
        }
        if k > 1:
            parents, _ = sizes(k - 1, vocab_size, limit)
            children = _children(model[k - 2].contexts, level.contexts)
            table["token"] = _padded(level.contexts[:, -1], contexts, 0, np.int32)
            table["start"] = _padded(children, parents + 1, len(level.contexts), np.int32)
        tables[order_name(k)] = table
    return tables


def _padded(x: np.ndarray, size: int, value, dtype) -> np.ndarray:
    return np.concatenate([x, np.full(size - len(x), value)]).astype(dtype)


def _children(parents: np.ndarray, contexts: np.ndarray) -> np.ndarray:
    """Where the children of each parent begin, and the end of the last; both are sorted."""
    merged = np.concatenate([parents, contexts[:, :-1]])
    number = np.arange(len(merged)) >= len(parents)  # a parent sorts before its children
    order = np.lexsort((number, *merged.T[::-1]))
    parent_of = np.cumsum(~number[order]) - 1
    counts = np.bincount(parent_of[number[order]], minlength=len(parents))
    return np.concatenate([[0], np.cumsum(counts)])


def rows_at_once(vocab_size: int, rows: int) -> int:
    """Of so many contexts, those whose distributions exist at once."""
    return max(1, min(rows, CHUNK // vocab_size))


def distribution(
    tables: Tables, context: jax.Array, vocab_size: int, interpolated: bool
) -> jax.Array:
    """The probability of every token after a context, [vocabulary], float32.

    Args:
      tables: of the model.
      context: [order - 1] tokens, the most recent first; `vocab_size` for none.
      vocab_size: number of tokens.
      interpolated: how the orders are combined, see `ngram_smoothing`.
    """
    words = jnp.arange(vocab_size, dtype=jnp.int32)
    p = jnp.full(vocab_size, 1 / vocab_size)
    node, known = jnp.int32(0), jnp.bool_(True)
    for k in range(1, len(tables) + 1):
        table = tables[order_name(k)]
        if k > 1:
            token, start = context[k - 2], table["start"]
            child, there = _find(table["token"], start[node], start[node + 1], token, vocab_size)
            known = known & there & (token < vocab_size)
            node = jnp.where(known, child, 0)
        index, seen = _find(
            table["word"], table["first"][node], table["first"][node + 1], words, vocab_size
        )
        seen = seen & known
        mass = jnp.where(seen, table["mass"][index], 0)
        rest = jnp.where(known, table["backoff"][node], 1) * p
        p = mass + rest if interpolated else jnp.where(seen, mass, rest)
    return p


def _find(values, low, high, wanted, longest: int) -> tuple[jax.Array, jax.Array]:
    """Where `wanted` is in the ascending values[low:high], and whether it is there.

    Args:
      values: [n].
      low, high: scalars; at most `longest` values lie between them.
      wanted: of any shape.
    """
    end = high
    low, high = (jnp.broadcast_to(x, jnp.shape(wanted)) for x in (low, high))

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) // 2
        right = (low < high) & (values[middle] < wanted)
        left = (low < high) & ~right
        return jnp.where(right, middle + 1, low), jnp.where(left, middle, high)

    low, _ = jax.lax.fori_loop(0, longest.bit_length(), halve, (low, high))
    return low, (low < end) & (values[jnp.minimum(low, len(values) - 1)] == wanted)


def push(contexts: jax.Array, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    """Contexts [rows, length] after the first `lengths` of new tokens [rows, n]."""
    length = contexts.shape[1]
    line = jnp.concatenate([contexts[:, ::-1], tokens], 1)
    last = length + lengths[:, None] - 1 - jnp.arange(length)
    return jnp.take_along_axis(line, last, 1)
