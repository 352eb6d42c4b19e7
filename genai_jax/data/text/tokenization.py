"""Tokenizers: bytes, numbers, a ``tokenizers`` JSON file, or a SentencePiece model.

Every tokenizer also reports how many bytes each of its tokens stands for, so that models with
different vocabularies can be compared in bits per byte.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from genai_jax.config import ConfigError, MissingFile
from genai_jax.data.text.arithmetic import SYMBOLS

BOUNDARIES = ("<|endoftext|>", "</s>", "<eos>", "[SEP]")


class Tokenizer(Protocol):
    """What the loaders, the tasks and the samplers need from a tokenizer."""

    spec: str  # the argument of `load_tokenizer`
    vocab_size: int
    boundary_id: int  # the one id that both starts and ends a document

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, int32 ``[length]``; the boundary is never among them."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; boundaries are dropped, and invalid UTF-8 becomes U+FFFD."""
        ...

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each token stands for, int32 ``[vocab_size]``; 0 for the boundary."""
        ...

    def fingerprint(self) -> str:
        """sha256, in hex, of everything that determines the ids."""
        ...


def load_tokenizer(spec: str) -> Tokenizer:
    """Loads "bytes", "numbers:N", a tokenizers ``.json`` or a SentencePiece ``.model`` file."""
    if spec == "bytes":
        return ByteTokenizer()
    if spec.startswith("numbers:"):
        return NumberTokenizer(spec)
    kinds = {".json": JsonTokenizer, ".model": SentencePieceTokenizer}
    kind = kinds.get(os.path.splitext(spec)[1])
    if kind is None:
        raise ConfigError(
            f"unknown tokenizer {spec!r}: use bytes, numbers:N, a tokenizers .json file, or a "
            "SentencePiece .model file"
        )
    if not os.path.isfile(spec):
        raise MissingFile(f"--data.tokenizer={spec}: no such file", "data.tokenizer")
    return kind(spec)


class ByteTokenizer:
    """UTF-8 bytes. The boundary is NUL; NULs in the text, which are rare, are dropped.

    Bytes that are not UTF-8, which are read as lone surrogates, are encoded as the original bytes.
    """

    spec = "bytes"
    vocab_size = 256
    boundary_id = 0

    def encode(self, text: str) -> np.ndarray:
        data = text.encode("utf-8", "surrogateescape").replace(b"\0", b"")
        return np.frombuffer(data, np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(i) for i in ids if 0 < i < 256).decode("utf-8", "replace")

    def token_bytes(self) -> np.ndarray:
        return np.array([0] + [1] * 255, np.int32)

    def fingerprint(self) -> str:
        return hashlib.sha256(b"bytes").hexdigest()


class NumberTokenizer:
    """Words of arithmetic, separated by spaces: the numbers below N and symbols, one token each.

    A word counts as its bytes plus the space that follows it.
    """

    boundary_id = 0

    def __init__(self, spec: str):
        self.spec = spec
        number = spec.removeprefix("numbers:")
        if not (number.isascii() and number.isdigit() and int(number)):
            raise ConfigError(
                f"tokenizer {spec!r}: write numbers:N, with N positive, for the numbers below N"
            )
        self._words = ["", *SYMBOLS, *map(str, range(int(number)))]
        self._ids = {word: i for i, word in enumerate(self._words)}
        self.vocab_size = len(self._words)

    def encode(self, text: str) -> np.ndarray:
        try:
            return np.array([self._ids[word] for word in text.split()], np.int32)
        except KeyError as error:
            raise ConfigError(
                f"tokenizer {self.spec!r} does not know the word {error}, only numbers up to "
                f"{self._words[-1]} and {' '.join(SYMBOLS)}"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(self._words[i] for i in ids if i != self.boundary_id)

    def token_bytes(self) -> np.ndarray:
        return np.array([0, *(len(word) + 1 for word in self._words[1:])], np.int32)

    def fingerprint(self) -> str:
        return hashlib.sha256(self.spec.encode()).hexdigest()


class JsonTokenizer:
    """A tokenizer file of the ``tokenizers`` library.

    `token_bytes` is exact for byte-level BPE without a normalizer; for other models it counts the
    UTF-8 bytes of a token's printed form, with "▁" as a space and a leading "##" as nothing.
    """

    def __init__(self, spec: str):
        tokenizers = _library("tokenizers", spec)
        self.spec = spec
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(spec)
        except Exception as error:  # the library raises plain Exception
            raise ConfigError(f"tokenizer {spec!r} cannot be read: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Otherwise a document that mentions "<|endoftext|>" would end there.
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1
        self.boundary_id = self._find_boundary()
        self._fingerprint = _file_hash(spec)

    def encode(self, text: str) -> np.ndarray:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return np.array(encoding.ids, np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        known = [int(i) for i in ids if i != self.boundary_id]
        return self._tokenizer.decode(known, skip_special_tokens=True)

    def token_bytes(self) -> np.ndarray:
        parts = json.loads(self._tokenizer.to_str())
        byte_level = any("ByteLevel" in json.dumps(parts[p]) for p in ("pre_tokenizer", "decoder"))
        counts = np.zeros(self.vocab_size, np.int32)
        for token, i in self._tokenizer.get_vocab(with_added_tokens=False).items():
            # A byte-level token is spelled with one character per byte.
            counts[i] = len(token) if byte_level else _piece_bytes(token)
        for i, added in self._tokenizer.get_added_tokens_decoder().items():
            counts[i] = 0 if added.special else len(added.content.encode())
        counts[self.boundary_id] = 0
        return counts

    def fingerprint(self) -> str:
        return self._fingerprint

    def _find_boundary(self) -> int:
        for name in BOUNDARIES:
            boundary = self._tokenizer.token_to_id(name)
            if boundary is not None:
                return boundary
        raise ConfigError(
            f"tokenizer {self.spec!r} has no token that ends a document; it needs one of "
            f"{', '.join(BOUNDARIES)}"
        )


class SentencePieceTokenizer:
    """A SentencePiece model; its end-of-sentence piece is the boundary.

    `token_bytes` counts "▁" as a space, so it is exact for a model with byte fallback that neither
    normalizes the text nor adds a leading space.
    """

    def __init__(self, spec: str):
        sentencepiece = _library("sentencepiece", spec)
        self.spec = spec
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=spec)
        except Exception as error:  # RuntimeError, or anything that protobuf raises
            raise ConfigError(f"tokenizer {spec!r} cannot be read: {error}") from None
        self.vocab_size = self._model.vocab_size()
        self.boundary_id = self._model.eos_id()
        if self.boundary_id < 0:
            raise ConfigError(f"tokenizer {spec!r} has no end-of-sentence piece (eos_id is -1)")
        self._fingerprint = _file_hash(spec)

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._model.encode(text), np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(i) for i in ids if i != self.boundary_id])

    def token_bytes(self) -> np.ndarray:
        counts = np.zeros(self.vocab_size, np.int32)
        for i in range(self.vocab_size):
            if not (self._model.is_control(i) or self._model.is_unknown(i)):
                counts[i] = _piece_bytes(self._model.id_to_piece(i))
        counts[self.boundary_id] = 0
        return counts

    def fingerprint(self) -> str:
        return self._fingerprint


def _piece_bytes(piece: str) -> int:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return 1
    return len(piece.removeprefix("##").replace("▁", " ").encode())


def _library(name: str, spec: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(
            f"tokenizer {spec!r} needs the package {name}: pip install genai_jax[text]"
        ) from None


def _file_hash(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
