"""Random access to the documents of a data set, split into train and validation.

`open_source` is the one way in. Data sets that come from the disk in one piece (``text:PATH`` and
the embedded ones) are held in memory, so they are meant for up to a gigabyte or so; anything larger
belongs into TFDS, which is read one example at a time.
"""

import functools
import hashlib
from collections.abc import Sequence
from typing import Protocol

from genai_jax.config import ConfigError
from genai_jax.data.images import digits
from genai_jax.data.text import arithmetic, stdlib
from genai_jax.data.text import files as text_files

SPLITS = ("train", "validation")
EMBEDDED = {"python_docs": stdlib.docs, "python_source": stdlib.source}
# Images written out; name -> (share held out in percent, split) -> documents.
PIXELS = {"digit_pixels": digits.pixel_documents}
# Made up; each takes a number, as in ``addition:3``.
SYNTHETIC = {
    "addition": arithmetic.addition,
    "modular_addition": arithmetic.modular_addition,
    "modular_division": arithmetic.modular_division,
}


class Source(Protocol):
    """Random access to documents. A data set of images would return dicts of arrays instead."""

    name: str
    size_bytes: int | None  # UTF-8 bytes of all documents; None if only a full pass would tell

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> str: ...

    def fingerprint(self) -> str:
        """sha256, in hex, of what the split holds."""
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
      ConfigError: no such data set, nothing in it, or nothing left for this split.
    """
    if split not in SPLITS:
        raise ConfigError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    name = config.dataset
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

        made_up = [f"{kind}:N" for kind in sorted(SYNTHETIC)]
        ours = [*sorted(EMBEDDED), *sorted(PIXELS), *made_up, "text:PATH"]
        return tfds_source.open_tfds(config, split, embedded=ours)
    held_out = hold_out(documents, config.validation_percent)
    chosen = [d for d in documents if (content_hash(d) in held_out) == (split == "validation")]
    if not chosen:
        raise ConfigError(
            f"{name} holds one document, so none is left for validation: add documents, or divide "
            "the file by blank lines or form feeds"
        )
    return MemorySource(f"{name}[{split}]", chosen)


def hold_out(documents: Sequence[str], percent: int) -> set[bytes]:
    """The content hashes of the documents that validation gets.

    The documents are ranked by the hash of their content, so the choice depends neither on their
    order nor on their names, and copies of a document fall on the same side.

    Returns:
      `percent` of the distinct documents: at least one, but none if there is only one.
    """
    hashes = sorted({content_hash(document) for document in documents})
    if len(hashes) == 1:
        return set()
    return set(hashes[: max(1, len(hashes) * percent // 100)])


def content_hash(document: str) -> bytes:
    return hashlib.sha256(encode_document(document)).digest()


def encode_document(document: str) -> bytes:
    """The bytes that were read, also where they were not UTF-8."""
    return document.encode("utf-8", "surrogateescape")


@functools.cache
def _embedded(name: str) -> list[str]:
    return EMBEDDED[name]()


@functools.cache
def _synthetic(name: str) -> list[str]:
    kind, _, number = name.partition(":")
    if not (number.isascii() and number.isdigit()):
        raise ConfigError(f"--data.dataset={name}: write {kind}:N with a number for N")
    return SYNTHETIC[kind](int(number))
