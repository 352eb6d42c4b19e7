"""Random access to the documents of a data set, split into train and validation.

`open_source` is the only entry point. Data sets that are read from disk in one piece
(``text:PATH`` and the embedded ones) are held in memory, so they should stay below about a
gigabyte; anything larger belongs in TFDS, which is read one example at a time.
"""

import collections
import functools
import hashlib
import os
from collections.abc import Sequence
from typing import Protocol

from genai_jax.config import ConfigError, refuse_set
from genai_jax.data.images import digits
from genai_jax.data.text import arithmetic, stdlib
from genai_jax.data.text import files as text_files

SPLITS = ("train", "validation")
EMBEDDED = {"python_docs": stdlib.docs, "python_source": stdlib.source}
# Images written out as text; name -> function (percentage held out, split) -> documents.
PIXELS = {"digit_pixels": digits.pixel_documents}
# Synthetic problems; each takes a number, as in ``addition:3``.
SYNTHETIC = {
    "addition": arithmetic.addition,
    "modular_addition": arithmetic.modular_addition,
    "modular_division": arithmetic.modular_division,
}


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


def open_source(config, split: str) -> Source:
    """Opens one split of ``config.dataset``.

    Args:
      config: a `DataConfig`.
      split: "train" or "validation".

    Raises:
      ConfigError: an unknown data set, an empty one, or no documents for this split.
    """
    if split not in SPLITS:
        raise ConfigError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    name = config.dataset
    if name in PIXELS or name in EMBEDDED or name.partition(":")[0] in ("text", *SYNTHETIC):
        of_tfds = ("data_dir", "text_key")
        refuse_set("data", config, of_tfds, f"applies only to TFDS data sets, not {name}")
    if name in PIXELS:
        documents = PIXELS[name](config.validation_percent, split)
        return MemorySource(f"{name}[{split}]", documents)
    if name in EMBEDDED:
        documents = _embedded(name)
    elif name.startswith("text:"):
        path = name.removeprefix("text:")
        documents = text_files.read(path, strict=config.tokenizer != "bytes")
    elif name.partition(":")[0] in SYNTHETIC:
        documents = _synthetic(name)
    else:
        from genai_jax.data.text import tfds as tfds_source

        synthetic = [f"{kind}:N" for kind in sorted(SYNTHETIC)]
        built_in = [*sorted(EMBEDDED), *sorted(PIXELS), *synthetic, "text:PATH"]
        return tfds_source.open_tfds(config, split, built_in=built_in)
    held_out = hold_out(documents, config.validation_percent)
    selected = [d for d in documents if (content_hash(d) in held_out) == (split == "validation")]
    if not selected:
        advice = "add documents"
        if os.path.isfile(name.removeprefix("text:")):
            advice += (
                ", or separate parts of the file with form feeds, or with blank lines at least "
                f"{text_files.MIN_CHARACTERS:,} characters apart"
            )
        raise ConfigError(
            f"{name} contains only one document, so none is left for validation: {advice}"
        )
    return MemorySource(f"{name}[{split}]", selected)


def hold_out(documents: Sequence[str], percent: int) -> set[bytes]:
    """The content hashes of the documents held out for validation.

    Documents are ranked by the hash of their content, so the split depends neither on their order
    nor on their names, and copies of a document fall on the same side. A document with which more
    than half of the text would be held out is passed over, if `percent` is less than half.

    Returns:
      `percent` percent of the distinct documents: at least one, unless there is only one.
    """
    sizes = collections.Counter()
    for document in documents:
        sizes[content_hash(document)] += len(document)
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
