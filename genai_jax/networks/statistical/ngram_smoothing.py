"""From counts of n-grams to probabilities: Kneser-Ney and Good-Turing; on the host, in float64.

Every order k has a `mass` for each n-gram that was seen and a `backoff` for each context. With the
probability p of the order below (uniform below the first), they mean

    interpolated   p_k(w | context) = mass(context, w) + backoff(context) p(w)
    otherwise      p_k(w | context) = mass(context, w) if seen, else backoff(context) p(w)

where the mass of an n-gram that was not seen is 0 and the backoff of an unseen context is 1.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from genai_jax.networks.statistical.ngram_counts import Level

KATZ_LARGEST = 5  # counts up to this are discounted (Katz 1987, section II)
INTERPOLATED = {"modified_kneser_ney": True, "kneser_ney": True, "good_turing": False}


class Smoothed(NamedTuple):
    """One order.

    Attributes:
      contexts: [contexts, order - 1] int32, sorted, the most recent token first.
      first: where the n-grams of each context begin, and the end of the last, [contexts + 1].
      words: [n-grams] int32, ascending within a context.
      mass: [n-grams].
      backoff: [contexts].
    """

    contexts: np.ndarray
    first: np.ndarray
    words: np.ndarray
    mass: np.ndarray
    backoff: np.ndarray


def smooth(levels: Sequence[Level], vocab_size: int, method: str) -> list[Smoothed]:
    """The model of each order, by one of `INTERPOLATED`."""
    if method == "good_turing":
        return katz(levels, vocab_size)
    return [kneser_ney(level, method == "modified_kneser_ney") for level in levels]


def count_of_counts(counts: np.ndarray, largest: int) -> np.ndarray:
    """n_0 .. n_largest: how many n-grams have each count, [largest + 1] float64."""
    return np.bincount(np.minimum(counts, largest + 1), minlength=largest + 2)[:-1].astype(float)


# Kneser-Ney.


def kneser_ney_discounts(counts: np.ndarray, modified: bool) -> np.ndarray:
    """What is taken from a count of 0, 1, 2, and more, [4] float64.

    One discount (Kneser and Ney 1995, after Ney et al. 1994), or one for each count (Chen and
    Goodman 1999, equation 26), estimated from the counts of counts. Where those do not allow it,
    as when no n-gram has a count of 1, it is 0.5, or 0.5, 1, and 1.5 (as KenLM's fallback).
    """
    n = count_of_counts(counts, 4)
    y = n[1] / max(n[1] + 2 * n[2], 1)
    if not modified:
        one = y if 0 < y < 1 else 0.5
        return np.array([0.0, one, one, one])
    if n[1:].all():
        d = np.array([0, *(r - (r + 1) * y * n[r + 1] / n[r] for r in (1, 2, 3))])
        if (d[1:] > 0).all():
            return d
    return np.array([0.0, 0.5, 1.0, 1.5])


def kneser_ney(level: Level, modified: bool) -> Smoothed:
    """Interpolated Kneser-Ney of one order (Chen and Goodman 1999, section 4.1.6)."""
    level = _kept(level, level.continuations > 0)  # not those that only begin a cut segment
    counts = level.continuations
    contexts, first, group = _contexts(level)
    total = np.bincount(group, counts, len(contexts))
    taken = kneser_ney_discounts(counts, modified)[np.minimum(counts, 3)]
    mass = (counts - taken) / total[group]
    backoff = np.bincount(group, taken, len(contexts)) / total
    return Smoothed(contexts, first, level.words, mass, backoff)


# Good-Turing, with Katz's back-off.


def good_turing_factors(counts: np.ndarray) -> np.ndarray:
    """Katz's factor of a count of 0 .. KATZ_LARGEST and of more, [KATZ_LARGEST + 2] float64.

    A count r of at most k is replaced by r times its factor, in proportion to what Good (1953)
    takes away, such that all n-grams together lose the number of those that occur once (Katz 1987,
    equation 13). k is KATZ_LARGEST, or less where the counts of counts do not give factors between
    0 and 1; with k = 1, n-grams that occur once count as unseen.
    """
    n = count_of_counts(counts, KATZ_LARGEST + 1)
    factors = np.ones(KATZ_LARGEST + 2)
    factors[0] = 0
    if not n[1]:
        return factors
    for k in range(KATZ_LARGEST, 1, -1):
        common = (k + 1) * n[k + 1] / n[1]
        if not n[1 : k + 1].all() or common >= 1:
            continue
        r = np.arange(1, k + 1)
        d = ((r + 1) * n[2 : k + 2] / (r * n[1 : k + 1]) - common) / (1 - common)
        if ((d > 0) & (d <= 1)).all():
            factors[1 : k + 1] = d
            return factors
    factors[1] = 0
    return factors


def katz(levels: Sequence[Level], vocab_size: int) -> list[Smoothed]:
    """Back-off to the order below with Good-Turing's discounts (Katz 1987, equations 17 to 21).

    A context whose n-grams lose nothing, although it lacks some tokens, gets one count more for
    those (as SRILM does); one that has seen every token leaves nothing to the order below.
    """
    smoothed, below = [], np.zeros(0)  # `below`: probability of each n-gram of the level below
    for level in levels:
        contexts, _, group = _contexts(level)
        count = len(contexts)
        factors = good_turing_factors(level.raw)[np.minimum(level.raw, KATZ_LARGEST + 1)]
        kept = factors > 0
        shorter = (
            below[level.shorter] if len(level.shorter) else np.full(len(group), 1 / vocab_size)
        )
        total = np.bincount(group, level.raw, count)
        seen = np.bincount(group, kept, count)
        left = total - np.bincount(group, level.raw * factors, count)
        complete = seen == vocab_size
        total = total + ((left < 1e-6) & ~complete)
        mass = level.raw * factors / total[group]
        given = np.bincount(group, mass, count)
        mass = np.where(complete[group], mass / np.maximum(given, 1e-15)[group], mass)
        unseen = np.maximum(1 - np.bincount(group, kept * shorter, count), 1e-15)
        backoff = np.where(complete, 0, (1 - given) / unseen)
        below = np.where(kept, mass, backoff[group] * shorter)
        smoothed.append(_without_unseen(level, kept, mass, backoff, group))
    return smoothed


def _without_unseen(level: Level, kept, mass, backoff, group) -> Smoothed:
    """The order without n-grams that count as unseen, and without contexts that have no others."""
    contexts, first, _ = _contexts(_kept(level, kept))
    there = np.unique(group[kept])
    return Smoothed(contexts, first, level.words[kept], mass[kept], backoff[there])


def _kept(level: Level, kept: np.ndarray) -> Level:
    """The level without some n-grams; its indices `shorter` stay those of the whole level below."""
    return Level(*(x[kept] if len(x) == len(kept) else x for x in level))


def _contexts(level: Level) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct contexts, where the n-grams of each begin, and the context of each n-gram."""
    new = np.ones(len(level.words), bool)
    new[1:] = (level.contexts[1:] != level.contexts[:-1]).any(1)
    first = np.flatnonzero(new)
    return level.contexts[first], np.append(first, len(new)), np.cumsum(new) - 1
