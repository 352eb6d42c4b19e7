"""Cutting documents into passages loses nothing."""

import pytest

from genai_jax.data.text.passages import Passages
from genai_jax.data.text.sources import MemorySource

DOCUMENTS = ["one line\nand another line\n" * 9, "word " * 40, "x" * 100, "short"]


@pytest.mark.parametrize("size", [0, 1, 7, 30, 1000])
def test_concatenated_passages_are_the_documents(size):
    passages = Passages(MemorySource("test", DOCUMENTS), size)
    documents, current = [], ""
    for i in range(len(passages)):
        text, ends = passages[i]
        assert text and (not size or len(text) <= size + size // 2)
        current += text
        if ends:
            documents.append(current)
            current = ""
    assert documents == DOCUMENTS and current == ""


def test_cuts_fall_after_lines_or_words():
    passages = Passages(MemorySource("test", DOCUMENTS[:2]), 40)
    texts = [passages[i] for i in range(len(passages))]
    assert len(texts) > 6
    assert all(text.endswith(("\n", " ")) for text, _ in texts)
