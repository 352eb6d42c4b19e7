"""Fill in the middle: text rearranged so that a middle follows what surrounds it.

Bavarian et al. 2022, "Efficient training of language models to fill in the middle", section 3. A
text is cut into prefix, middle, and suffix at two uniform places. In the order PSM it becomes
``PRE prefix SUF suffix MID middle``, in the order SPM ``PRE SUF suffix MID prefix middle``, where
PRE, SUF, and MID are three tokens after those of the tokenizer. A boundary follows each middle,
also where the text was cut, so that a model learns where a middle ends.
"""

from typing import NamedTuple

import numpy as np

COUNT = 3  # tokens besides those of the tokenizer
ADDED = COUNT + 1  # most tokens that are added: a text that is cut off also gets a boundary


class Sentinels(NamedTuple):
    """Ids of the tokens that mark the parts."""

    prefix: int
    suffix: int
    middle: int

    @classmethod
    def after(cls, vocab_size: int) -> "Sentinels":
        return cls(vocab_size, vocab_size + 1, vocab_size + 2)


class FillInMiddle(NamedTuple):
    """How texts are rearranged.

    Attributes:
      rate: share of the texts.
      suffix_first: share of those in the order SPM.
      sentinels: tokens between the parts.
      boundary: token that begins and ends a document, which stays where it is.
      seed: of the choices.
    """

    rate: float
    suffix_first: float
    sentinels: Sentinels
    boundary: int
    seed: int

    def __call__(self, ids: np.ndarray, place: tuple[int, ...]) -> np.ndarray:
        """The ids of a text, rearranged or not.

        Args:
          ids: [length], or [length, 2] with the bytes of each token. The first is not part of the
            text, nor is a boundary at the end.
          place: identifies the text, for the randomness.
        """
        rng = np.random.default_rng((self.seed, *place))
        end = len(ids) - self._ends(ids)
        if rng.random() >= self.rate or end < 2:
            return ids
        cuts = np.sort(rng.integers(1, end + 1, 2))
        prefix, middle, suffix = np.split(ids[1:end], cuts - 1)
        parts = arranged(prefix, suffix, self.sentinels, rng.random() < self.suffix_first)
        last = ids[end:]
        if not len(last):
            last = np.zeros_like(ids[:1])  # stands for no text
            last.reshape(-1)[0] = self.boundary
        return np.concatenate([ids[:1], *parts, middle, last])

    def added(self, ids: np.ndarray) -> int:
        """By how many tokens a text grows if it is rearranged."""
        return COUNT if self._ends(ids) else ADDED

    def _ends(self, ids: np.ndarray) -> bool:
        """Whether the last token is the boundary after a text."""
        return len(ids) > 1 and bool(ids.reshape(len(ids), -1)[-1, 0] == self.boundary)


def arranged(
    prefix: np.ndarray, suffix: np.ndarray, sentinels: Sentinels, suffix_first: bool
) -> list[np.ndarray]:
    """What comes before a middle, in parts; ids [length], or [length, 2] with their bytes."""
    marks = np.asarray(sentinels, prefix.dtype)
    if prefix.ndim == 2:
        marks = np.stack([marks, np.zeros_like(marks)], 1)  # they stand for no text
    pre, suf, mid = marks[:1], marks[1:2], marks[2:]
    if suffix_first:
        return [pre, suf, suffix, mid, prefix]
    return [pre, prefix, suf, suffix, mid]


def restored(ids: np.ndarray, sentinels: Sentinels, boundary: int) -> np.ndarray:
    """The inverse of `FillInMiddle` for ids [length] of one text, rearranged or not.

    In the order SPM, which part of what follows MID is the prefix cannot be seen and need not be.
    The boundary after a middle stays, also where the text had none.
    """
    at = {name: np.flatnonzero(ids == mark) for name, mark in sentinels._asdict().items()}
    if not len(at["middle"]):
        return ids
    pre, suf, mid = (int(at[name][0]) for name in ("prefix", "suffix", "middle"))
    before, rest = ids[:pre], ids[mid + 1 :]
    if suf == pre + 1:
        prefix, suffix = ids[:0], ids[suf + 1 : mid]
    else:
        prefix, suffix = ids[pre + 1 : suf], ids[suf + 1 : mid]
    middle = rest[: len(rest) - int(rest[-1:].tolist() == [boundary])]
    return np.concatenate([before, prefix, middle, suffix, rest[len(middle) :]])
