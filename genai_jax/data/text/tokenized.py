"""The documents of a source as token ids."""

import numpy as np

from genai_jax.data.text.byte_counts import closed
from genai_jax.data.text.passages import Passages
from genai_jax.data.text.sources import Source, encode_document

_CACHED_BYTES = 64 * 2**20  # token ids of a source up to this size are cached, 4 bytes per token


class TokenizedSource:
    """The passages of a source as int32 ids: a boundary before each, and after a document's end.

    If the bytes of a token depend on the text, they are a second column; what a document has and
    none of its tokens stands for belongs to its end.
    """

    def __init__(self, source: Source, tokenizer, passage_length: int = 0):
        self.source = source
        self._tokenizer, self.sizes = tokenizer, tokenizer.token_bytes() is None
        small = source.size_bytes is not None and source.size_bytes <= _CACHED_BYTES
        self._cache: dict[int, np.ndarray] | None = {} if small else None
        # Cutting needs the documents' lengths, known only for sources in memory.
        self._passages = Passages(source, passage_length if source.size_bytes is not None else 0)

    def __len__(self) -> int:
        return len(self._passages)

    def __getitem__(self, index: int) -> np.ndarray:
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        boundary = self._tokenizer.boundary_id
        text, ends = self._passages[index]
        around = (1, int(ends))
        if not self.sizes:
            ids = np.pad(self._tokenizer.encode(text), around, constant_values=boundary)
        else:
            ids, sizes = self._tokenizer.encode_with_sizes(text)
            ids, sizes = np.pad(ids, around, constant_values=boundary), np.pad(sizes, around)
            ids = np.stack([ids, closed(sizes, len(encode_document(text)))], 1)
        if self._cache is not None:
            self._cache[index] = ids
        return ids
