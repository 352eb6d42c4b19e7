"""Sources and targets from one text: spans behind sentinels, infilling, and shuffled sentences.

Everything is an array of token ids on the host; what is random comes from a generator of numpy.
"""

import itertools
from typing import NamedTuple

import numpy as np


class Noise(NamedTuple):
    """How much of a text is hidden.

    Attributes:
      rate: share of the tokens.
      span: mean length of what is hidden in one place.
    """

    rate: float
    span: float

    def counts(self, length: int) -> tuple[int, int]:
        """Of a text of so many tokens, those that are hidden, and in how many spans.

        Raffel et al. 2020 (T5), section 3.1.4: both are fixed, so that the lengths of sources and
        targets are. A text of less than two tokens has none.
        """
        if length < 2:
            return 0, 0
        hidden = min(max(round(length * self.rate), 1), length - 1)
        return hidden, min(max(round(hidden / self.span), 1), hidden, length - hidden)

    def lengths(self, length: int) -> tuple[int, int]:
        """The tokens of source and target that `hide_spans` returns."""
        hidden, spans = self.counts(length)
        return length - hidden + spans + 1, hidden + spans + 1


def hide_spans(
    ids: np.ndarray, noise: Noise, first: int, end: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Source and target of span corruption (Raffel et al. 2020, figure 2).

    The source has one sentinel in place of each span, the target each sentinel with the span that
    it hides; `end` is last in both. A text begins with what is not hidden.

    Args:
      ids: [length], without sentinels.
      noise: how much is hidden.
      first: the first sentinel; the following ones come after it.
      end: the token at the end.
      rng: for the places.
    """
    hidden, spans = noise.counts(len(ids))
    seen_parts = _parts(len(ids) - hidden, spans, rng)
    hidden_parts = _parts(hidden, spans, rng)
    source, target, at = [], [], 0
    for i in range(spans):
        seen_end = at + seen_parts[i]
        source += [ids[at:seen_end], [first + i]]
        at = seen_end + hidden_parts[i]
        target += [[first + i], ids[seen_end:at]]
    return _joined(*source, ids[at:], [end]), _joined(*target, [end])


def restore_spans(
    source: np.ndarray, target: np.ndarray, first: int, count: int, end: int
) -> np.ndarray:
    """The text of `hide_spans`. Of what a target lacks, nothing is restored; the rest is ignored.

    Args:
      source, target: ids.
      first: the first sentinel.
      count: number of sentinels.
      end: the token after which both end.
    """
    source, target = (x[: _position(x, end)] for x in (source, target))
    marks = [*np.flatnonzero((target >= first) & (target < first + count)), len(target)]
    spans = {int(target[a]): target[a + 1 : b] for a, b in itertools.pairwise(marks)}
    pieces = [spans.get(int(x), source[:0]) if first <= x < first + count else [x] for x in source]
    return _joined(*pieces)


def infill(
    ids: np.ndarray, noise: Noise, mask: int, limit: int, rng: np.random.Generator
) -> np.ndarray:
    """The text with one mask in place of each span (Lewis et al. 2020, BART, section 2.2).

    Lengths of spans have a Poisson distribution, and where one is 0 a mask is inserted. The last
    span is cut to the share of tokens that are hidden.

    Args:
      ids: [length].
      noise: how much is hidden.
      mask: the token that stands for a span.
      limit: most tokens of the result; masks that hide nothing are left out first. At least
        `length`.
      rng: for the places.
    """
    hidden = noise.counts(len(ids))[0]
    sizes: list[int] = []
    while (left := hidden - sum(sizes)) > 0:
        sizes.append(min(int(rng.poisson(noise.span)), left))
    spans = [size for size in sizes if size]
    inserted = min(len(sizes) - len(spans), max(limit - (len(ids) - hidden + len(spans)), 0))
    # Spans, and insertions, which take no token, fall between the tokens that are seen.
    sizes = [*spans, *[0] * inserted]
    rng.shuffle(sizes)
    places = np.sort(rng.integers(0, len(ids) - hidden + 1, len(sizes)))
    pieces, at, seen = [], 0, 0
    for place, size in zip(places, sizes, strict=True):
        pieces += [ids[at : at + place - seen], [mask]]
        at, seen = at + place - seen + size, place
    return _joined(*pieces, ids[at:])


def permute_sentences(ids: np.ndarray, ends: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The sentences in a random order (Lewis et al. 2020, BART, section 2.2).

    Args:
      ids: [length].
      ends: whether a sentence ends with a token, [length] bool.
      rng: for the order.
    """
    sentences = np.split(ids, np.flatnonzero(ends[:-1]) + 1)
    return _joined(*(sentences[i] for i in rng.permutation(len(sentences))))


def _parts(total: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` positive lengths with this sum, all such choices equally likely."""
    if not count:
        return np.zeros(0, int)
    cuts = np.sort(rng.permutation(total - 1)[: count - 1]) + 1
    return np.diff(cuts, prepend=0, append=total)


def _position(ids: np.ndarray, token: int) -> int:
    """Where the token is first; the length if it does not occur."""
    places = np.flatnonzero(ids == token)
    return int(places[0]) if len(places) else len(ids)


def _joined(*pieces) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int32), *pieces]).astype(np.int32)
