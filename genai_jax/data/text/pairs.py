"""Pairs of texts, a source and a target: translations, questions and answers, summaries.

A pair is held as one document; see `pair_documents`.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from genai_jax.config import ConfigError, refuse_set
from genai_jax.data.folders import list_files, say
from genai_jax.data.own_code import own_data, read_own
from genai_jax.data.text.contents import read_content
from genai_jax.data.text.files import memory
from genai_jax.data.text.number_names import number_names
from genai_jax.data.text.pair_documents import document_of, texts_of
from genai_jax.data.text.sources import (
    MemorySource,
    Source,
    is_built_in,
    only_document,
    split_documents,
)
from genai_jax.data.text.tables import Column, is_table, read_rows
from genai_jax.errors import MissingFile, NothingHeldOut, printable

SYNTHETIC = {"number_names": number_names}
BUILT_IN = ("pairs:PATH", "number_names:DIGITS")


def open_pairs(config: Any, split: str, opened: dict) -> Source:
    """Opens one split of the pairs ``config.dataset``; arguments as those of `open_source`.

    Pairs with the same source are in the same split.

    Raises:
      ConfigError: a data set without pairs, or flags that only documents have.
    """
    name = config.dataset
    _refuse_unused(config)
    if name.partition(":")[0] not in ("pairs", *SYNTHETIC) and not own_data(name):
        if is_built_in(name):
            raise ConfigError(
                f"--data.dataset={printable(name)} has no pairs of texts: use "
                f"{', '.join(BUILT_IN)}, a translation data set of TFDS, or a function of your own"
            )
        from genai_jax.data.text import tfds

        return tfds.open_tfds_pairs(config, split, built_in=list(BUILT_IN))
    if not opened:
        documents = _documents(config)
        if not isinstance(documents, dict):
            key = lambda document: texts_of(document)[0]
            documents = split_documents(documents, config.validation_percent, key)
        opened |= documents
    if not opened[split]:
        error = NothingHeldOut if split == "validation" else ConfigError
        raise error(f"{only_document(name, 'source text')} {split}: add pairs")
    return MemorySource(f"{name}[{split}]", opened[split])


def _refuse_unused(config: Any):
    names = ["text_key", "answer_after", "passage_length", "unique_tokens"]
    refuse_set("data", config, names, "has no effect on pairs of texts")
    kind = config.dataset.partition(":")[0]
    if kind in ("pairs", *SYNTHETIC) or own_data(config.dataset):
        why = f"applies only to TFDS, not {config.dataset}"
        refuse_set("data", config, ["data_dir"], why)
    if kind in SYNTHETIC or own_data(config.dataset):
        why = f"applies only to tables and TFDS, not {config.dataset}"
        refuse_set("data", config, ["source_key", "target_key"], why)


def _documents(config: Any) -> list[str] | dict[str, list[str]]:
    name = config.dataset
    if own_data(name):
        return _own(config)
    kind, _, rest = name.partition(":")
    if kind == "pairs":
        return read(
            rest, config.source_key or "source", config.target_key or "target",
            strict=config.tokenizer != "bytes",
        )  # fmt: skip
    if not (rest.isascii() and rest.isdigit()):
        raise ConfigError(f"--data.dataset={name}: write {kind}:N with a whole number N")
    return [document_of(*pair) for pair in SYNTHETIC[kind](int(rest))]


def read(path: str, source_key: str, target_key: str, *, strict: bool) -> list[str]:
    """The pairs of a table, or of all tables of a folder; says on stderr how many.

    Rows in which one of the texts is missing or blank are skipped.

    Args:
      path: a file or a folder.
      source_key, target_key: columns, or keys in JSON.
      strict: reject bytes that are not UTF-8; see `files.read`.

    Raises:
      ConfigError: nothing at `path`, not a table, no such columns, or no pairs.
    """
    place = f"--data.dataset=pairs:{printable(path)}"
    if "\0" in path or not os.path.lexists(path):
        raise MissingFile(f"{place}: no such file or folder", "data.dataset")
    files = [f for f in list_files(path)[0] if is_table(f)] if os.path.isdir(path) else [path]
    documents, skipped = [], 0
    columns = Column(source_key, "--data.source_key"), Column(target_key, "--data.target_key")
    for file in files:
        if not is_table(file):
            raise ConfigError(
                f"{place} is not a table: pairs are two columns of a .tsv, .csv, .jsonl, or "
                ".parquet file"
            )
        limit = memory()
        data = read_content(file, limit)
        texts = [read_rows(file, data, c, strict=strict, limit=limit) for c in columns]
        pairs = [(a, b) for a, b in zip(*texts, strict=True) if (a or "").strip() and b]
        documents += [document_of(a, b) for a, b in pairs if b.strip()]
        skipped += len(texts[0])
    skipped -= len(documents)
    if not documents:
        raise ConfigError(f"{place} is empty: it has no pairs to train on")
    note = f" (skipped: {skipped:,} rows without one of the texts)" if skipped else ""
    say(f"note: pairs:{printable(path)}: {len(documents):,} pairs{note}")
    return documents


def _own(config: Any) -> list[str] | dict[str, list[str]]:
    """What a function outside this project returns: pairs, or those of each split."""
    returned = read_own(config)
    if isinstance(returned, Mapping):
        why = f"has no effect: {config.dataset} returned the pairs of each split"
        refuse_set("data", config, ["validation_percent"], why)
        return {split: _checked(config, pairs) for split, pairs in returned.items()}
    return _checked(config, returned)


def _checked(config: Any, pairs: Any) -> list[str]:
    is_pair = lambda x: (
        isinstance(x, Sequence) and len(x) == 2 and all(isinstance(text, str) for text in x)
    )
    if not isinstance(pairs, list | tuple) or not all(map(is_pair, pairs)):
        raise ConfigError(
            f"--data.dataset={config.dataset} returned something other than a list of pairs "
            "(source, target) of strings"
        )
    if not pairs:
        raise ConfigError(f"--data.dataset={config.dataset} returned no pairs")
    return [document_of(*pair) for pair in pairs]
