"""The data of word vectors: words of a text source, in windows or in a co-occurrence matrix."""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from genai_jax.config import Config, ConfigError, field
from genai_jax.data.kept import MOST_BYTES, VOCABULARY, Keeper, KeptData
from genai_jax.data.own_code import SPLITS, is_users_own
from genai_jax.data.text.loader import DataConfig
from genai_jax.data.text.sources import MemorySource, Source, open_source, unused_flags
from genai_jax.data.text.word_contexts import (
    Cells,
    Epochs,
    cell_batch,
    context_windows,
    cooccurrences,
    padded_batches,
)
from genai_jax.data.text.words import Corpus, Vocabulary, as_ids, count_words, keep_probability
from genai_jax.errors import NothingHeldOut, printable
from genai_jax.files import MIB, read_text, unreadable, write_bytes
from genai_jax.tasks.protocol import ArraySpec, Batch

_TEXT = {f.name: f for f in dataclasses.fields(DataConfig)}
MOST_VOCABULARY = 256 * MIB


def _shared(name: str):
    """The same flag as that of packed text."""
    f = _TEXT[name]
    return dataclasses.field(default=f.default, metadata=f.metadata)


@dataclasses.dataclass(frozen=True)
class WordDataConfig:
    dataset: str = _shared("dataset")
    batch_size: int = field(
        512, "Words with their contexts, or cells of the co-occurrence matrix, per step, over all "
        "devices.", minimum=1,
    )  # fmt: skip
    min_count: int = field(
        5, "Occurrences in the training documents that a word needs; others are left out.",
        minimum=1,
    )  # fmt: skip
    max_words: int | None = field(
        None, "Most words of the vocabulary, the most frequent ones; all if unset.", minimum=2
    )
    data_dir: str | None = _shared("data_dir")
    text_key: str = _shared("text_key")
    validation_percent: int = _shared("validation_percent")
    prefetch: int = _shared("prefetch")
    tokenizer: ClassVar = "bytes"  # text of any encoding is read

    def of(self, dataset: str) -> "WordDataConfig":
        """The same settings for another data set, without those that it does not use."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        unused = {n: defaults[n] for n in unused_flags(dataset) if n in defaults}
        return dataclasses.replace(self, dataset=dataset, **unused)


class WordData:
    """Words of documents; see `genai_jax.tasks.protocol.Data`.

    The vocabulary and the text, four bytes a word, are in memory.

    Args:
      config: of the run.
      window: words on each side of a word that are its context.
      subsample: threshold of `keep_probability`.
      counted: whether examples are cells of a co-occurrence matrix instead of words in windows.
    """

    def __init__(self, config: Config, window: int, subsample: float = 0, counted: bool = False):
        self.config, self.window = config.data, window
        self._subsample, self._counted = subsample, counted
        self._seed = config.run.seed % 2**32
        place = config.kept.get("data.dataset")
        self._kept = KeptData(place) if place else None
        self._kept_vocabulary = config.kept.get("data.vocabulary")
        self._opened: dict = {}  # see `open_source`

    # Words.

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """The words of the run.

        Raises:
          ConfigError: the training documents have none, or none that is frequent enough.
        """
        if self._kept_vocabulary:
            return read_vocabulary(self._kept_vocabulary)
        c, name = self.config, printable(self.config.dataset)
        counted = count_words(_texts(self._source("train")), c.min_count, c.max_words)
        if counted.words:
            return counted
        if not count_words(_texts(self._source("train")), 1, 1).words:
            raise ConfigError(
                f"--data.dataset={name} has no words, which are runs of letters and digits with at "
                "least one letter"
            )
        raise ConfigError(
            f"--data.min_count={c.min_count}: no word of {name} occurs so often; lower it"
        )

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.vocabulary.words)}

    def corpus(self, split: str) -> Corpus:
        """The known words of a split."""
        return as_ids(_texts(self._source(split)), self.vocabulary.words)

    def _source(self, split: str) -> Source:
        kept = self._kept.documents(split) if self._kept else None
        if kept is not None:
            return MemorySource(str(self._kept.record.get(split)), kept)
        return open_source(self.config, split, self._opened)

    # Batches.

    @property
    def batch_spec(self) -> dict[str, ArraySpec]:
        rows, around = (self.config.batch_size,), 2 * self.window
        if self._counted:
            shapes = {"word": rows, "context": rows, "count": rows, "mask": rows}
        else:
            wide = (*rows, around)
            shapes = {"word": rows, "context": wide, "context_mask": wide, "mask": rows}
        whole = ("word", "context")
        dtype = lambda name: jnp.int32 if name in whole else jnp.float32
        axes = ("batch", None)
        return {n: ArraySpec(s, dtype(n), axes[: len(s)]) for n, s in shapes.items()}

    def train(self, rows: Sequence[int] | None = None):
        from genai_jax.data.prefetch import BatchIterator

        c, corpus = self.config, self.corpus("train")
        if self._counted:
            cells = self._cells(corpus, "train")
            one = len(cells.rows), functools.partial(cell_batch, cells)
            open_pass = lambda epoch: one
        else:
            self._check_windows(corpus, "train")
            open_pass = functools.partial(self._windows, corpus)
        rows = range(c.batch_size) if rows is None else rows
        return BatchIterator(Epochs(open_pass, c.batch_size, rows, self._seed), c.prefetch)

    def _windows(self, corpus: Corpus, epoch: int):
        """A pass over the words that subsampling leaves, each with a radius of its own.

        The radius is uniform from 1 to the window, so that near words count more (Mikolov et al.
        2013, "Efficient estimation of word representations in vector space", section 3.2).
        """
        rng = np.random.default_rng((self._seed, epoch, 1))
        stays = keep_probability(self.vocabulary.counts, self._subsample)[corpus.ids]
        kept = corpus.kept(rng.random(len(corpus.ids)) < stays)
        kept = corpus if len(kept.ids) < 2 else kept
        radius = rng.integers(1, self.window + 1, len(kept.ids))
        read = lambda places: context_windows(kept, places, self.window, radius[places])
        return len(kept.ids), read

    def held_out(self, max_batches: int, rows: Sequence[int] | None = None) -> Iterator[Batch]:
        """Whole windows around all known words, or all cells of the held-out documents' matrix."""
        rows = range(self.config.batch_size) if rows is None else rows
        corpus = self.corpus("validation")
        if self._counted:
            cells = self._cells(corpus, "validation")
            size, read = len(cells.rows), functools.partial(cell_batch, cells)
        else:
            self._check_windows(corpus, "validation")
            size = len(corpus.ids)
            read = lambda places: context_windows(corpus, places, self.window)
        batches = padded_batches(read, size, self.config.batch_size, rows)
        for done, batch in enumerate(batches):
            if done == max_batches:
                return
            yield batch

    def _check_windows(self, corpus: Corpus, split: str):
        """Raises `ConfigError` if no two known words are in one document."""
        if not np.any(corpus.documents[1:] == corpus.documents[:-1]):
            name, words = printable(self.config.dataset), len(self.vocabulary.words)
            problem = (
                f"--data.dataset={name}: no document of its {split} split has two of the "
                f"{words:,} words of the vocabulary"
            )
            raise (NothingHeldOut if split == "validation" else ConfigError)(problem)

    def _cells(self, corpus: Corpus, split: str) -> Cells:
        self._check_windows(corpus, split)
        return cooccurrences(corpus, len(self.vocabulary.words), self.window)

    # What a run keeps.

    def record(self) -> dict:
        if self._kept:
            return self._kept.record
        facts = {
            "dataset": self.config.dataset,
            "words": len(self.vocabulary.words),
            "vocabulary_sha256": self._vocabulary_hash(),
        }
        for split in SPLITS:
            try:
                source = self._source(split)
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

    def keep(self, folder: pathlib.Path, record: dict) -> None:
        """Keeps the vocabulary, and held-out documents of data that are not built in."""
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / VOCABULARY, _vocabulary_text(self.vocabulary).encode())
        keeper = Keeper(folder, record, {})
        if not is_users_own(self.config.dataset) or keeper.is_there():
            return
        try:
            source = self._source("validation")
        except ConfigError:
            source = None
        if source and source.size_bytes is not None and source.size_bytes <= MOST_BYTES:
            keeper.documents("validation", list(_texts(source)))
        elif source and source.size_bytes is not None:
            keeper.leave_out("validation", source.size_bytes)
        keeper.finish()

    def check(self, trained_on: dict) -> None:
        """Raises `ConfigError` if the vocabulary differs from the one in a run's record."""
        now = self._vocabulary_hash()
        before = trained_on.get("vocabulary_sha256", now)
        if before != now:
            raise ConfigError(
                f"the vocabulary of --data.dataset={printable(self.config.dataset)} is not the one "
                f"that the checkpoint was trained with: sha256 {now[:12]} now, {before[:12]} then"
            )

    def _vocabulary_hash(self) -> str:
        return hashlib.sha256(_vocabulary_text(self.vocabulary).encode()).hexdigest()


def _texts(source: Source) -> Iterator[str]:
    return (source[i] for i in range(len(source)))


def _vocabulary_text(vocabulary: Vocabulary) -> str:
    """A line for each word: the word, a tab, its count."""
    pairs = zip(vocabulary.words, vocabulary.counts.tolist(), strict=True)
    return "".join(f"{word}\t{count}\n" for word, count in pairs)


def read_vocabulary(path: str) -> Vocabulary:
    """The vocabulary that a run kept.

    Raises:
      ConfigError: it cannot be read, or is not a vocabulary.
    """
    rows = [line.split("\t") for line in read_text(path, limit=MOST_VOCABULARY).split("\n") if line]
    digits = lambda text: text.isascii() and text.isdigit() and len(text) < 19
    if not rows or not all(len(row) == 2 and row[0] and digits(row[1]) for row in rows):
        raise unreadable(path, "it is not a list of words and their counts")
    counts = np.array([int(count) for _, count in rows], np.int64)
    if len({word for word, _ in rows}) < len(rows) or counts.min() < 1:
        raise unreadable(path, "its words are not distinct, or a count is 0")
    return Vocabulary(tuple(word for word, _ in rows), counts)
