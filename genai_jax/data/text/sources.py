"""Random access to the documents of a data set, split into train and validation.

`open_source` is the only entry point. Data sets that are read from disk in one piece
(``text:PATH`` and the embedded ones) are held in memory, so they should stay below about a
gigabyte; anything larger belongs in TFDS, which is read one example at a time.
"""

import collections
import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from genai_jax.config import ConfigError, refuse_set
from genai_jax.data.audio import spoken_characters
from genai_jax.data.images import digits
from genai_jax.data.own_code import SPLITS, own_data
from genai_jax.data.text import arithmetic, needles, packages, stdlib
from genai_jax.data.text import files as text_files
from genai_jax.data.text.own_documents import own_documents
from genai_jax.errors import NothingHeldOut, printable

EMBEDDED = {
    "python_docs": stdlib.docs,
    "python_source": stdlib.source,
    "package_docs": packages.docs,
    "package_source": packages.source,
}
# Values written out as text: pixels of images, or samples of sounds; name -> function (percentage
# held out, split) -> documents.
VALUES = {
    "digit_pixels": digits.pixel_documents,
    spoken_characters.NAME: spoken_characters.sound_documents,
}
# Synthetic problems; each takes a number, as in ``addition:3``.
SYNTHETIC = {
    "addition": arithmetic.addition,
    "modular_addition": arithmetic.modular_addition,
    "modular_division": arithmetic.modular_division,
    "repeats": arithmetic.repeats,
    "needles": needles.documents,
}
KEYS = ("source_key", "target_key")
PAIRED = ("pairs", "number_names")  # kinds of data sets whose documents are pairs


class Source(Protocol):
    """Random access to documents; for images see `genai_jax.data.images.sources`."""

    name: str
    size_bytes: int | None  # UTF-8 bytes of all documents; None if unknown without a full pass

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> str: ...

    def fingerprint(self) -> str:
        """sha256 of the split's contents, in hex."""
        ...


class MemorySource:
    """Documents held in memory."""

    def __init__(self, name: str, documents: Sequence[str]):
        self.name = name
        self._documents = documents
        self.size_bytes = sum(len(encode_document(document)) for document in documents)

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> str:
        return self._documents[index]

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for document in self._documents:
            digest.update(content_hash(document))
        return digest.hexdigest()


class LazySource:
    """Documents that an object outside this project reads one at a time."""

    size_bytes = None

    def __init__(self, name: str, documents: Any):
        self.name, self._documents = name, documents

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> str:
        return self._documents[index]

    def fingerprint(self) -> str:
        return str(self._documents.fingerprint())


def open_source(config, split: str, opened: dict | None = None) -> Source:
    """Opens one split of ``config.dataset``.

    Args:
      config: a `DataConfig`.
      split: "train" or "validation".
      opened: filled by one call and used by the next one with the same config, so that data in
        memory are read once for both splits.

    Raises:
      ConfigError: an unknown data set, an empty one, or no documents for this split.
    """
    if split not in SPLITS:
        raise ConfigError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    name = config.dataset
    _refuse_unused(config)
    if name.partition(":")[0] in PAIRED:
        raise ConfigError(
            f"--data.dataset={printable(name)} has pairs of texts: set "
            "--task=sequence_to_sequence and --sequence_to_sequence.objective=pairs"
        )
    if name in VALUES:
        documents = VALUES[name](config.validation_percent, split)
        return MemorySource(f"{name}[{split}]", documents)
    if not is_built_in(name):
        from genai_jax.data.text import tfds as tfds_source

        synthetic = [f"{kind}:N" for kind in sorted(SYNTHETIC)]
        built_in = [*sorted(EMBEDDED), *sorted(VALUES), *synthetic, "text:PATH"]
        return tfds_source.open_tfds(config, split, built_in=built_in)
    splits = {} if opened is None else opened
    if not splits:
        documents = _documents(config)
        if not isinstance(documents, dict):
            documents = split_documents(documents, config.validation_percent)
        splits |= documents
    if not len(splits[split]):
        error = NothingHeldOut if split == "validation" else ConfigError
        raise error(f"{only_document(name)} {split}: {_advice(name)}")
    documents = splits[split]
    if isinstance(documents, list | tuple):
        return MemorySource(f"{name}[{split}]", documents)
    return LazySource(f"{name}[{split}]", documents)


def unused_flags(name: str) -> tuple[str, ...]:
    """The flags about reading a data set that the one called `name` does not use."""
    kind = name.partition(":")[0]
    if kind in PAIRED:
        return ("data_dir", "text_key", *KEYS * (kind != "pairs"))
    if not is_built_in(name) or own_data(name):
        return KEYS
    path = name.removeprefix("text:") if name.startswith("text:") else None
    # If the path is missing, that is what the user has to hear.
    if path and (not os.path.exists(path) or text_files.has_columns(path)):
        return ("data_dir", *KEYS)
    return ("data_dir", "text_key", *KEYS)


def _refuse_unused(config):
    name, unused = config.dataset, unused_flags(config.dataset)
    keys = [key for key in KEYS if hasattr(config, key)]
    refuse_set(
        "data", config, keys, "is for pairs of texts: --sequence_to_sequence.objective=pairs"
    )
    refuse_set(
        "data",
        config,
        ["data_dir"] if "data_dir" in unused else [],
        f"applies only to TFDS, not {name}",
    )
    if "text_key" in unused:
        tables = "TFDS data sets and .jsonl, .csv, .tsv, and .parquet files"
        refuse_set("data", config, ["text_key"], f"applies only to {tables}, not {name}")


def is_built_in(name: str) -> bool:
    known = name in VALUES or name in EMBEDDED or name.partition(":")[0] in ("text", *SYNTHETIC)
    return known or bool(own_data(name))


def _documents(config) -> Sequence[str] | dict[str, Any]:
    """All documents of a data set, or those of each split."""
    name = config.dataset
    if own_data(name):
        return own_documents(config)
    if name in EMBEDDED:
        return _embedded(name)
    if name.startswith("text:"):
        path, strict = name.removeprefix("text:"), config.tokenizer != "bytes"
        return text_files.read(path, strict=strict, text_key=config.text_key)
    return _synthetic(name)


def only_document(name: str, what: str = "document") -> str:
    """The beginning of the error that a split of this data set is empty."""
    return f"{printable(name)} contains only one {what} (copies count once), so none is left for"


def split_documents(
    documents: Sequence[str], percent: int, key: Callable[[str], str] = str
) -> dict[str, list[str]]:
    """The documents of each split, in order; those with the same `key` are in the same one."""
    held_out = hold_out([key(document) for document in documents], percent)
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for document in documents:
        is_held_out = content_hash(key(document)) in held_out
        splits["validation" if is_held_out else "train"].append(document)
    return splits


def _advice(name: str) -> str:
    """What to do about a single document."""
    path = name.removeprefix("text:")
    if text_files.is_split(path):
        return (
            "add documents, or separate parts of the file with form feeds, or with "
            f"blank lines at least {text_files.MIN_CHARACTERS:,} characters apart"
        )
    return f"add {'rows' if os.path.isfile(path) else 'documents'}"


def hold_out(documents: Sequence[str], percent: int) -> set[bytes]:
    """The content hashes of the documents held out for validation.

    Documents are ranked by the hash of their content, so the split depends neither on their order
    nor on their names, and copies of a document fall on the same side. A document with which more
    than half of the text would be held out is passed over, if `percent` is less than half.

    Returns:
      `percent` percent of the distinct documents: at least one, unless there is only one; all of
      them for 100.
    """
    sizes = collections.Counter()
    for document in documents:
        sizes[content_hash(document)] += len(document)
    if percent == 100:
        return set(sizes)
    if len(sizes) == 1:
        return set()
    count, most = max(1, len(sizes) * percent // 100), sizes.total() / (2 if percent < 50 else 1)
    held_out: set[bytes] = set()
    size = 0
    for digest in sorted(sizes):
        if len(held_out) < count and size + sizes[digest] <= most:
            held_out.add(digest)
            size += sizes[digest]
    return held_out


def content_hash(document: str) -> bytes:
    return hashlib.sha256(encode_document(document)).digest()


def encode_document(document: str) -> bytes:
    """The bytes that were read, including those that are not UTF-8."""
    return document.encode("utf-8", "surrogateescape")


@functools.cache
def _embedded(name: str) -> list[str]:
    return EMBEDDED[name]()


@functools.cache
def _synthetic(name: str) -> list[str]:
    kind, _, number = name.partition(":")
    if not (number.isascii() and number.isdigit()):
        raise ConfigError(f"--data.dataset={name}: write {kind}:N with a whole number N")
    return SYNTHETIC[kind](int(number))
