"""Batches of packed text; the global batches are the same for any number of processes."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from genai_jax.config import ConfigError, field
from genai_jax.data.kept import MOST_BYTES, Keeper, KeptData
from genai_jax.data.own_code import SPLITS, own_data
from genai_jax.data.shuffle import permuted
from genai_jax.data.text.fill_in_middle import ADDED, FillInMiddle, Sentinels
from genai_jax.data.text.packing import Batch, Packer
from genai_jax.data.text.sources import MemorySource, Source, open_source, unused_flags
from genai_jax.data.text.tokenization import load_tokenizer
from genai_jax.data.text.tokenized import TokenizedSource

if TYPE_CHECKING:
    from genai_jax.data.prefetch import BatchIterator


@dataclasses.dataclass(frozen=True)
class DataConfig:
    dataset: str = field(
        "python_docs",
        "Data set: the name of a TFDS data set, text:PATH, python_docs, python_source, "
        "package_docs, package_source, digit_pixels, spoken_characters, arithmetic "
        "(addition:DIGITS, modular_addition:P, modular_division:P), repeats:N, needles:CHARACTERS, "
        "or a function of your own, as my_package.my_module:my_documents; for pairs of texts, "
        "pairs:PATH or number_names:DIGITS.",
        path=True,
        outside=own_data,
    )
    batch_size: int = field(8, "Sequences per step, over all devices.", minimum=1)
    sequence_length: int = field(256, "Tokens per sequence.", minimum=1)
    held_out_length: int | None = field(
        None,
        "Tokens per sequence of held-out text, to score a model on longer texts than it was "
        "trained on; if unset, as many as in training.",
        minimum=1,
        changeable=True,
        at_use=("evaluate",),
    )
    tokenizer: str = field(
        "bytes",
        "Tokenizer: bytes, numbers:N, a tokenizers .json file, or a SentencePiece .model file.",
        path=True,
    )
    end_token: str | None = field(
        None,
        "Token that ends a document; if unset, a usual one that the tokenizer has.",
    )
    data_dir: str | None = field(None, "Folder of prepared TFDS data sets.", path=True)
    text_key: str = field(
        "text",
        "What holds the text: a TFDS feature, a key in .jsonl, or a column in .csv, .tsv, or "
        ".parquet.",
    )
    source_key: str | None = field(
        None,
        "Of pairs of texts, what holds the source, as for text_key; source if unset, or what a "
        "TFDS data set says.",
    )
    target_key: str | None = field(
        None,
        "Of pairs of texts, what holds the target; target if unset, or what a TFDS data set says.",
    )
    validation_percent: int = field(
        5,
        "Percentage of documents to hold out if the data set has no validation split.",
        minimum=1,
        maximum=99,
    )
    unique_tokens: int | None = field(
        None,
        "Approximate number of training tokens before the data repeats; all of them if unset.",
        minimum=1,
        maximum=10**15,
    )
    answer_after: str | None = field(
        None,
        "Token after which a document's targets count, except for its end; if unset, all targets "
        "count.",
    )
    passage_length: int | None = field(
        None,
        "Characters per passage into which in-memory training documents are cut, so that batches "
        "mix documents; 0 for no cuts; if unset, 4 times --data.sequence_length, or 0 with "
        "--data.answer_after.",
        minimum=0,
    )
    fim_rate: float = field(
        0.0,
        "Share of the training text that is rearranged as prefix, suffix, and middle, so that a "
        "model learns to fill in what is between.",
        minimum=0,
        maximum=1,
    )
    fim_level: str = field(
        "document",
        "Whether documents (or their passages) are rearranged, or the parts of them that share a "
        "sequence, which keeps all parts within it.",
        choices=("document", "context"),
    )
    fim_suffix_first: float = field(
        0.5,
        "Share of the rearranged text that begins with the suffix.",
        minimum=0,
        maximum=1,
    )
    prefetch: int = field(
        4, "Batches to prefetch in a background thread.", minimum=0, changeable=True
    )

    def __post_init__(self):
        if not self.fim_rate:
            for name, default in (("fim_level", "document"), ("fim_suffix_first", 0.5)):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name}={getattr(self, name)} has no effect without `fim_rate`"
                    )
        elif self.answer_after is not None:
            raise ValueError(
                f"fim_rate={self.fim_rate} rearranges text, answer_after={self.answer_after} needs "
                "its order: set one of them"
            )
        elif self.fim_level == "context" and self.sequence_length <= ADDED:
            raise ValueError(
                f"sequence_length={self.sequence_length} has no room for the {ADDED} tokens that "
                "fim_level=context adds"
            )

    @property
    def passage_characters(self) -> int:
        if self.passage_length is not None:
            return self.passage_length
        return 4 * self.sequence_length if self.answer_after is None else 0

    @property
    def scored_length(self) -> int:
        """Tokens per row of held-out text."""
        return self.held_out_length or self.sequence_length

    def of(self, dataset: str) -> "DataConfig":
        """The same settings for another data set, without those that it does not use."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        unused = {name: defaults[name] for name in unused_flags(dataset)}
        return dataclasses.replace(self, dataset=dataset, **unused)


class TextLoader:
    """Makes the rows of global batches: all of them, or those that a process needs.

    Args:
      config: what to read and in which shape.
      seed: determines the order of the documents.
      kept: what a run kept of its data, which is read instead.
      rewrite: split -> what rewrites the rows of its batches, see `Packer`; None to leave them.
    """

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        kept: KeptData | None = None,
        rewrite: Callable[[str], Callable] | None = None,
    ):
        self.config, self._kept, self._rewrite = config, kept, rewrite
        self.tokenizer = load_tokenizer(config.tokenizer, config.end_token)
        self._seed = seed % 2**32
        self._documents: dict[str, TokenizedSource] = {}
        self._opened: dict = {}  # see `open_source`

    def batches(self, split: str = "train", rows: Sequence[int] | None = None) -> "BatchIterator":
        """Endless shuffled batches of int32 arrays ``[rows, sequence_length]``; see `Packer`.

        Each pass over the documents has a different order. Close the iterator to stop its thread.

        Args:
          split: "train" or "validation".
          rows: which rows of the global batch to make; all if None.
        """
        from genai_jax.data.prefetch import BatchIterator

        documents = self._open(split)
        indices = self._unique(documents) if split == "train" else range(len(documents))
        fill = self._fill_in_middle() if split == "train" else None
        whole = fill is not None and self.config.fim_level == "document"

        def get_document(ordinal: int) -> np.ndarray:
            epoch, index = divmod(ordinal, len(indices))
            ids = documents[indices[permuted(index, len(indices), (self._seed, epoch))]]
            return fill(ids, (ordinal,)) if whole else ids

        rows = self._rows_or_all(rows)
        packer = self._packer(get_document, rows, split, None if whole else fill)
        return BatchIterator(packer, self.config.prefetch)

    def _fill_in_middle(self) -> FillInMiddle | None:
        config = self.config
        if not config.fim_rate:
            return None
        sentinels = Sentinels.after(self.tokenizer.vocab_size)
        boundary = self.tokenizer.boundary_id
        return FillInMiddle(
            config.fim_rate, config.fim_suffix_first, sentinels, boundary, self._seed
        )

    def _packer(self, get_document, rows: Sequence[int], split: str, rearrange=None) -> Packer:
        config, counted = self.config, None
        if config.answer_after is not None:
            mark = self.tokenizer.encode(config.answer_after)
            if len(mark) != 1:
                raise ConfigError(
                    f"--data.answer_after={config.answer_after} must be one token of "
                    f"--data.tokenizer={config.tokenizer}, not {len(mark)}"
                )
            counted = lambda ids: (
                (np.cumsum(ids == mark) > 0) & (ids != mark) & (ids != self.tokenizer.boundary_id)
            )
        length = config.sequence_length if split == "train" else config.scored_length
        shape = (config.batch_size, length)
        sizes = self.tokenizer.token_bytes() is None
        added = rearrange.added if rearrange else None
        rewrite = self._rewrite and self._rewrite(split)
        flag = "sequence_length" if length == config.sequence_length else "held_out_length"
        return Packer(get_document, rows, *shape, counted, sizes, rearrange, added, rewrite, flag)

    def _unique(self, documents: TokenizedSource) -> Sequence[int]:
        """Indices of the passages to train on; those for fewer unique tokens are a subset.

        Raises:
          ConfigError: `unique_tokens` is more than the training data has.
        """
        limit = self.config.unique_tokens
        if limit is None:
            return range(len(documents))
        indices, tokens = [], 0
        for i in range(len(documents)):
            if tokens >= limit:
                return indices
            indices.append(permuted(i, len(documents), (self._seed, 2**32 - 1)))
            tokens += len(documents[indices[-1]]) - 1
        if tokens < limit:
            raise ConfigError(
                f"--data.unique_tokens={limit}: the training data has only {tokens} tokens"
            )
        return indices

    def evaluation_batches(
        self, max_batches: int = -1, rows: Sequence[int] | None = None
    ) -> Iterator[Batch]:
        """One pass over the validation split, in order.

        The number of batches does not depend on `rows`: a row without documents left is padding.

        Args:
          max_batches: stop after this many batches; -1 for the whole split, every token exactly
            once.
          rows: which rows of the global batch to make; all if None.
        """
        documents = self._open("validation")
        config, rows = self.config, self._rows_or_all(rows)

        def get_document(ordinal: int) -> np.ndarray | None:
            return documents[ordinal] if ordinal < len(documents) else None

        packer = self._packer(get_document, rows, "validation")
        done = 0
        while done != max_batches:
            batch = packer.next_batch()
            if batch is None:
                break
            yield batch
            done += 1
        # Other rows may have more batches: pad until the longest row ends.
        others = [row for row in range(config.batch_size) if row not in rows]
        if done != max_batches and others:
            total = max(self._evaluation_length(documents, row, max_batches) for row in others)
            for _ in range(done, total):
                yield packer.padding(len(rows))

    def _rows_or_all(self, rows: Sequence[int] | None) -> Sequence[int]:
        return range(self.config.batch_size) if rows is None else rows

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the data of a run; recorded in ``run.json``."""
        if self._kept:
            return self._kept.record
        facts: dict[str, Any] = {
            "dataset": self.config.dataset,
            "tokenizer": self.tokenizer.spec,
            "vocab_size": self.tokenizer.vocab_size,
            "tokenizer_sha256": self.tokenizer.fingerprint(),
        }
        if self.config.end_token is not None:
            facts["end_token"] = self.config.end_token
        if self.config.unique_tokens is not None:
            facts["unique_tokens"] = self.config.unique_tokens
        for split in SPLITS:
            try:
                source = self._open(split).source
            except ConfigError:  # a single document, which a run without evaluation may train on
                facts |= {split: None, f"{split}_documents": 0, f"{split}_sha256": None}
                continue
            facts |= {
                split: source.name,
                f"{split}_documents": len(source),
                f"{split}_sha256": source.fingerprint(),
            }
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        return facts | {"sha256": digest.hexdigest()}

    def held_out_count(self) -> int:
        """Documents of the validation split."""
        return len(self._open("validation").source)

    def held_out_document(self, index: int) -> str:
        """One document of the validation split."""
        return self._open("validation").source[index]

    def keep(self, keeper: Keeper):
        """Keeps the held-out documents, unless they are too large to be copied."""
        try:
            source = self._open("validation").source
        except ConfigError:  # a single document, which a run without evaluation may train on
            source = None
        if source and source.size_bytes is not None and source.size_bytes <= MOST_BYTES:
            keeper.documents("validation", [source[i] for i in range(len(source))])
        elif source and source.size_bytes is not None:
            keeper.leave_out("validation", source.size_bytes)
        keeper.finish()

    def _open(self, split: str) -> TokenizedSource:
        if split not in self._documents:
            kept = self._kept.documents(split) if self._kept else None
            read = lambda: self._source(split)
            source = read() if kept is None else MemorySource(self._kept.record[split], kept)
            self._documents[split] = self._tokenized(source, split)
        return self._documents[split]

    def _source(self, split: str) -> Source:
        return open_source(self.config, split, self._opened)

    def _tokenized(self, source: Source, split: str) -> Any:
        passages = self.config.passage_characters if split == "train" else 0
        return TokenizedSource(source, self.tokenizer, passages)

    def _evaluation_length(self, documents: TokenizedSource, row: int, limit: int) -> int:
        """Number of evaluation batches in which `row` has tokens, at most `limit`; -1: no limit."""
        length = self.config.scored_length
        tokens = 0
        for ordinal in range(row, len(documents), self.config.batch_size):
            size = len(documents[ordinal]) - 1
            if self.config.answer_after is not None and tokens % length + size > length:
                tokens += -tokens % length  # not cut: the document starts in the next batch
            tokens += size
            if 0 <= limit * length <= tokens:
                return limit
        return -(-tokens // length)
