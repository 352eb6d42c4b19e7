"""Batches of packed text: the same global batches for any number of processes."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from genai_jax.config import ConfigError, field
from genai_jax.data.shuffle import permuted
from genai_jax.data.text.packing import Batch, Packer, padding
from genai_jax.data.text.passages import Passages
from genai_jax.data.text.sources import SPLITS, Source, open_source
from genai_jax.data.text.tokenization import load_tokenizer

if TYPE_CHECKING:
    from genai_jax.data.prefetch import BatchIterator

_CACHED_BYTES = 64 * 2**20  # text of a source whose token ids are kept: four bytes a token


@dataclasses.dataclass(frozen=True)
class DataConfig:
    dataset: str = field(
        "python_docs",
        "TFDS name, python_docs, python_source, text:PATH, digit_pixels, or arithmetic: "
        "addition:DIGITS, modular_addition:P, modular_division:P",
    )
    batch_size: int = field(8, "sequences in a step, over all devices", minimum=1)
    sequence_length: int = field(256, "tokens in a sequence", minimum=1)
    tokenizer: str = field(
        "bytes", "bytes, numbers:N, a tokenizers .json file, or a SentencePiece .model file"
    )
    data_dir: str | None = field(None, "folder of prepared TFDS data sets")
    text_key: str = field("text", "TFDS feature that holds the text")
    validation_percent: int = field(
        5, "documents held out if the data has no validation split", minimum=1, maximum=99
    )
    unique_tokens: int | None = field(
        None,
        "training tokens, about, after which they come again; all if unset",
        minimum=1,
    )
    answer_after: str | None = field(
        None, "one token behind which a document's targets count, without its end; all if unset"
    )
    passage_length: int | None = field(
        None,
        "characters after which a training document in memory is cut, so that batches mix; "
        "4 sequence_length if unset (with answer_after, 0), 0 never",
        minimum=0,
    )
    prefetch: int = field(
        4, "batches made ahead in a background thread", minimum=0, changeable=True
    )

    @property
    def passage_characters(self) -> int:
        if self.passage_length is not None:
            return self.passage_length
        return 4 * self.sequence_length if self.answer_after is None else 0


class TextLoader:
    """Makes rows of the global batches: all of them, or those that a process asks for.

    Args:
      config: what to read and in which shape.
      seed: decides on the order of the documents.
    """

    def __init__(self, config: DataConfig, seed: int):
        self.config = config
        self.tokenizer = load_tokenizer(config.tokenizer)
        self._seed = seed % 2**32
        self._documents = {
            "train": _TokenizedSource(
                open_source(config, "train"), self.tokenizer, config.passage_characters
            )
        }

    def batches(self, split: str = "train", rows: Sequence[int] | None = None) -> "BatchIterator":
        """Endless shuffled batches of int32 arrays ``[rows, sequence_length]``: see `Packer`.

        Each pass over the documents has an order of its own. Close the iterator to end its thread.

        Args:
          split: "train" or "validation".
          rows: which rows of the global batch to make; all if None.
        """
        from genai_jax.data.prefetch import BatchIterator

        documents = self._open(split)
        chosen = self._unique(documents) if split == "train" else range(len(documents))

        def get_document(ordinal: int) -> np.ndarray:
            epoch, index = divmod(ordinal, len(chosen))
            return documents[chosen[permuted(index, len(chosen), (self._seed, epoch))]]

        return BatchIterator(self._packer(get_document, self._chosen(rows)), self.config.prefetch)

    def _packer(self, get_document, rows: Sequence[int]) -> Packer:
        config, counted = self.config, None
        if config.answer_after is not None:
            mark = self.tokenizer.encode(config.answer_after)
            if len(mark) != 1:
                raise ConfigError(
                    f"--data.answer_after={config.answer_after} is {len(mark)} tokens of "
                    f"--data.tokenizer={config.tokenizer} and has to be 1"
                )
            counted = lambda ids: (
                (np.cumsum(ids == mark) > 0) & (ids != mark) & (ids != self.tokenizer.boundary_id)
            )
        return Packer(get_document, rows, config.batch_size, config.sequence_length, counted)

    def _unique(self, documents: "_TokenizedSource") -> Sequence[int]:
        """The numbers of the passages to train on: some, which fewer unique tokens are a part of.

        Raises:
          ConfigError: there are not so many tokens.
        """
        limit = self.config.unique_tokens
        if limit is None:
            return range(len(documents))
        chosen, tokens = [], 0
        for i in range(len(documents)):
            if tokens >= limit:
                return chosen
            chosen.append(permuted(i, len(documents), (self._seed, 2**32 - 1)))
            tokens += len(documents[chosen[-1]]) - 1
        if tokens < limit:
            raise ConfigError(
                f"--data.unique_tokens={limit}: the training data has {tokens} tokens in all"
            )
        return chosen

    def evaluation_batches(
        self, max_batches: int = -1, rows: Sequence[int] | None = None
    ) -> Iterator[Batch]:
        """One pass over the validation split, in order.

        As many batches whichever rows are asked for: one that has no documents left is padding.

        Args:
          max_batches: stop after so many; -1 for the whole split, every token exactly once.
          rows: which rows of the global batch to make; all if None.
        """
        documents = self._open("validation")
        config, rows = self.config, self._chosen(rows)

        def get_document(ordinal: int) -> np.ndarray | None:
            return documents[ordinal] if ordinal < len(documents) else None

        packer = self._packer(get_document, rows)
        done = 0
        while done != max_batches:
            batch = packer.next_batch()
            if batch is None:
                break
            yield batch
            done += 1
        # Other rows may have more: pad until the longest of them ends.
        others = [row for row in range(config.batch_size) if row not in rows]
        if done != max_batches and others:
            total = max(self._evaluation_length(documents, row, max_batches) for row in others)
            for _ in range(done, total):
                yield padding(len(rows), config.sequence_length)

    def _chosen(self, rows: Sequence[int] | None) -> Sequence[int]:
        return range(self.config.batch_size) if rows is None else rows

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the data of a run, for ``run.json``."""
        facts: dict[str, Any] = {
            "dataset": self.config.dataset,
            "tokenizer": self.tokenizer.spec,
            "vocab_size": self.tokenizer.vocab_size,
            "tokenizer_sha256": self.tokenizer.fingerprint(),
        }
        if self.config.unique_tokens is not None:
            facts["unique_tokens"] = self.config.unique_tokens
        for split in SPLITS:
            try:
                source = self._open(split).source
            except ConfigError:  # one document only: a run without evaluation may train on it
                facts |= {split: None, f"{split}_documents": 0, f"{split}_sha256": None}
                continue
            facts |= {
                split: source.name,
                f"{split}_documents": len(source),
                f"{split}_sha256": source.fingerprint(),
            }
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        return facts | {"sha256": digest.hexdigest()}

    def _open(self, split: str) -> "_TokenizedSource":
        if split not in self._documents:
            source = open_source(self.config, split)
            self._documents[split] = _TokenizedSource(source, self.tokenizer)
        return self._documents[split]

    def _evaluation_length(self, documents: "_TokenizedSource", row: int, limit: int) -> int:
        """In how many batches of an evaluation `row` has tokens; counts no further than `limit`."""
        length = self.config.sequence_length
        tokens = 0
        for ordinal in range(row, len(documents), self.config.batch_size):
            size = len(documents[ordinal]) - 1
            if self.config.answer_after is not None and tokens % length + size > length:
                tokens += -tokens % length  # a document that is not cut
            tokens += size
            if 0 <= limit * length <= tokens:
                return limit
        return -(-tokens // length)


class _TokenizedSource:
    """The passages of a source as int32 ids, a boundary before each and behind a document's end."""

    def __init__(self, source: Source, tokenizer, passage_length: int = 0):
        self.source = source
        self._tokenizer = tokenizer
        small = source.size_bytes is not None and source.size_bytes <= _CACHED_BYTES
        self._cache: dict[int, np.ndarray] | None = {} if small else None
        # Only of a source in memory are the lengths known without reading all of it.
        self._passages = Passages(source, passage_length if source.size_bytes is not None else 0)

    def __len__(self) -> int:
        return len(self._passages)

    def __getitem__(self, index: int) -> np.ndarray:
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        boundary = self._tokenizer.boundary_id
        text, ends = self._passages[index]
        ids = np.pad(self._tokenizer.encode(text), (1, int(ends)), constant_values=boundary)
        if self._cache is not None:
            self._cache[index] = ids
        return ids
