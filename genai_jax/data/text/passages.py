"""Cuts long documents, so that a batch is drawn from many places and not from a few long texts.

A row of the batch reads its documents from end to end. Where they are much longer than the row,
batch after batch would come from the same handful of documents; cut into passages and shuffled,
every batch is close to a fair draw.
"""

from typing import NamedTuple

from genai_jax.data.text.sources import Source


class Passage(NamedTuple):
    text: str
    ends: bool  # whether the document ends here: only then is its end to be predicted


class Passages:
    """The documents of a source in passages of about `size` characters, 0 for whole documents.

    A cut falls behind the last line break in the passage's second half, else behind the last space,
    else at `size` exactly. The passages of a document joined are the document.
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
    """[start, stop) of every passage; a rest of less than half a passage joins the last one."""
    cuts, start = [], 0
    while len(text) - start > size + size // 2:
        middle, end = start + size // 2, start + size
        at = text.rfind("\n", middle, end)
        at = at if at >= 0 else text.rfind(" ", middle, end)
        stop = at + 1 if at >= 0 else end
        cuts.append((start, stop))
        start = stop
    return [*cuts, (start, len(text))]
