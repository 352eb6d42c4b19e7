"""Cuts long documents into passages, so that a batch mixes many documents.

A row of the batch reads its documents from start to end. If they are much longer than the row,
consecutive batches would come from the same few documents; cut into passages and shuffled, every
batch is close to a uniform sample of the data.
"""

from typing import NamedTuple

from genai_jax.data.text.sources import Source


class Passage(NamedTuple):
    text: str
    ends: bool  # whether the document ends here; only then is its end a target


class Passages:
    """The documents of a source in passages of about `size` characters; 0 for whole documents.

    A cut falls after the last line break in the second half of the passage, else after the last
    space there, else at exactly `size`. The concatenation of a document's passages is the document.
    """

    def __init__(self, source: Source, size: int):
        self._source = source
        self._parts: list[tuple[int, int, int | None]] | None = None  # (document, start, stop)
        if size:
            self._parts = [
                (index, start, stop)
                for index in range(len(source))
                for start, stop in _cuts(source[index], size)
            ]

    def __len__(self) -> int:
        return len(self._source if self._parts is None else self._parts)

    def __getitem__(self, index: int) -> Passage:
        if self._parts is None:
            return Passage(self._source[index], True)
        document, start, stop = self._parts[index]
        text = self._source[document]
        return Passage(text[start:stop], stop == len(text))


def _cuts(text: str, size: int) -> list[tuple[int, int]]:
    """[start, stop) of each passage; a rest of up to half a passage is added to the last one."""
    cuts, start = [], 0
    while len(text) - start > size + size // 2:
        middle, end = start + size // 2, start + size
        position = text.rfind("\n", middle, end)
        position = position if position >= 0 else text.rfind(" ", middle, end)
        stop = position + 1 if position >= 0 else end
        cuts.append((start, stop))
        start = stop
    return [*cuts, (start, len(text))]
