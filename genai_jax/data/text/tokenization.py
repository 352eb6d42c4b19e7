"""Tokenizers: bytes, numbers, a ``tokenizers`` JSON file, or a SentencePiece model.

Every tokenizer also reports how many bytes of the text each token stands for, so that models with
different vocabularies can be compared in bits per byte.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from genai_jax.config import ConfigError, MissingFile
from genai_jax.data.text import byte_counts
from genai_jax.data.text.arithmetic import SYMBOLS
from genai_jax.files import MIB, parse_json, read_bytes, reason_of

MAX_BYTES = 256 * MIB  # of a tokenizer's file; the largest published ones have about 35 MiB
MAX_IDS = 1 << 24  # the largest published vocabularies have about 2**20
BOUNDARIES = (  # the first that a tokenizer has ends its documents
    "<|endoftext|>", "</s>", "<eos>", "[SEP]",
    "<|end_of_text|>", "<｜end▁of▁sentence｜>", "[EOS]", "<EOS_TOKEN>", "<|eos|>", "<|return|>",
)  # fmt: skip


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

    def token_bytes(self) -> np.ndarray | None:
        """UTF-8 bytes that each token stands for, int32 ``[vocab_size]``; 0 for the boundary.

        None if that depends on the text; then the tokenizer has `encode_with_sizes`.
        """
        ...

    def fingerprint(self) -> str:
        """sha256, in hex, of everything that determines the ids."""
        ...


def load_tokenizer(spec: str, end_token: str | None = None) -> Tokenizer:
    """Loads "bytes", "numbers:N", a tokenizers ``.json`` or a SentencePiece ``.model`` file.

    Args:
      spec: what to load.
      end_token: the boundary; if None, the end-of-sentence piece of a SentencePiece model, the
        first of `BOUNDARIES` that a tokenizers file has.
    """
    if end_token is not None and (spec == "bytes" or spec.startswith("numbers:")):
        raise ConfigError(
            f"--data.end_token={end_token}: --data.tokenizer={spec} has a boundary of its own"
        )
    if spec == "bytes":
        return ByteTokenizer()
    if spec.startswith("numbers:"):
        return NumberTokenizer(spec)
    kinds = {".json": JsonTokenizer, ".model": SentencePieceTokenizer}
    kind = kinds.get(os.path.splitext(spec)[1])
    if kind is None:
        raise ConfigError(
            f"--data.tokenizer={spec} is not a tokenizer: use bytes, numbers:N, a tokenizers .json "
            "file, or a SentencePiece .model file"
        )
    if "\0" not in spec and not os.path.lexists(spec):
        raise MissingFile(f"--data.tokenizer={spec}: no such file", "data.tokenizer")
    tokenizer = kind(spec, read_bytes(spec, f"tokenizer {spec!r}", limit=MAX_BYTES), end_token)
    if tokenizer.vocab_size > MAX_IDS:
        raise ConfigError(
            f"tokenizer {spec!r} has ids up to {tokenizer.vocab_size - 1:,}; at most {MAX_IDS:,} "
            "are supported"
        )
    return tokenizer


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
    """A tokenizer file of the ``tokenizers`` library."""

    def __init__(self, spec: str, content: bytes, end_token: str | None = None):
        tokenizers = _library("tokenizers", spec)
        self.spec = spec
        with _named_errors(spec, "cannot be read"):
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8-sig"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Otherwise a document that mentions "<|endoftext|>" would end there.
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        self.boundary_id = self._find_boundary(end_token)
        with _named_errors(spec, "cannot be read"):
            parts = parse_json(self._tokenizer.to_str())
        self._lossless = byte_counts.is_lossless(parts)
        self._fingerprint = hashlib.sha256(content).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._encoding(text).ids, np.int32)

    def encode_with_sizes(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """The ids, and the bytes of the text that each stands for; see `byte_counts.by_ends`."""
        encoding = self._encoding(text)
        ends = [end for _, end in encoding.offsets]
        return np.array(encoding.ids, np.int32), byte_counts.by_ends(text, ends)

    def _encoding(self, text: str) -> Any:
        with _named_errors(self.spec, f"cannot encode {text[:20]!r}..."):
            return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        known = [int(i) for i in ids if i != self.boundary_id]
        with _named_errors(self.spec, "cannot decode its ids"):
            return self._tokenizer.decode(known, skip_special_tokens=True)

    def token_bytes(self) -> np.ndarray | None:
        if not self._lossless:
            return None
        counts = np.zeros(self.vocab_size, np.int32)
        for token, i in self._tokenizer.get_vocab(with_added_tokens=False).items():
            counts[i] = len(token)  # spelled with one character per byte
        for i, added in self._tokenizer.get_added_tokens_decoder().items():
            counts[i] = 0 if added.special else len(added.content.encode())
        counts[self.boundary_id] = 0
        return counts

    def fingerprint(self) -> str:
        return self._fingerprint

    def _find_boundary(self, end_token: str | None) -> int:
        for name in BOUNDARIES if end_token is None else (end_token,):
            boundary = self._tokenizer.token_to_id(name)
            if boundary is not None:
                return boundary
        added = self._tokenizer.get_added_tokens_decoder().values()
        raise _no_boundary(self.spec, end_token, [x.content for x in added if x.special])


class SentencePieceTokenizer:
    """A SentencePiece model; its end-of-sentence piece is the boundary."""

    def __init__(self, spec: str, content: bytes, end_token: str | None = None):
        sentencepiece = _library("sentencepiece", spec)
        self.spec = spec
        with _named_errors(spec, "cannot be read"):
            self._model = sentencepiece.SentencePieceProcessor()
            self._model.LoadFromSerializedProto(content)
        self.vocab_size = self._model.vocab_size()
        pieces = [self._model.id_to_piece(i) for i in range(self.vocab_size)]
        self.boundary_id = self._model.eos_id()
        if end_token is not None:
            self.boundary_id = pieces.index(end_token) if end_token in pieces else -1
        if self.boundary_id < 0:
            special = [p for i, p in enumerate(pieces) if self._model.is_control(i)]
            raise _no_boundary(spec, end_token, special)
        self._fingerprint = hashlib.sha256(content).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._model.encode(text), np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(i) for i in ids if i != self.boundary_id])

    def encode_with_sizes(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """The ids, and the bytes of the text that each stands for."""
        names = ("encode_as_proto", "encode_as_immutable_proto")  # from 0.2.2 on, before
        encode = next(getattr(self._model, n) for n in names if hasattr(self._model, n))
        pieces = list(encode(text).pieces)
        sizes = [len(piece.surface.encode()) for piece in pieces]
        ids = np.array([piece.id for piece in pieces], np.int32)
        return ids, byte_counts.closed(sizes, len(text.encode()))

    def token_bytes(self) -> None:
        return None

    def fingerprint(self) -> str:
        return self._fingerprint


def _no_boundary(spec: str, end_token: str | None, special: Sequence[str]) -> ConfigError:
    shown = ", ".join(special[:20]) + ", ..." * (len(special) > 20) or "none"
    if end_token is None:
        problem = f"--data.tokenizer={spec} has none of the usual tokens that end a document: name "
        problem += "one with --data.end_token"
    else:
        problem = f"--data.end_token={end_token} is not a token of --data.tokenizer={spec}"
    return ConfigError(f"{problem}; its special tokens are: {shown}")


def _library(name: str, spec: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(
            f'tokenizer {spec!r} needs the package {name}: in the clone, pip install -e ".[text]"'
        ) from None


@contextlib.contextmanager
def _named_errors(spec: str, what: str) -> Iterator[None]:
    """Turns the errors of a tokenizer library into one line that names the file.

    Raises:
      ConfigError: any error in the body.
    """
    try:
        yield
    except BaseException as error:  # a library written in Rust panics with a BaseException
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = reason_of(error)[:300] or type(error).__name__
        raise ConfigError(f"tokenizer {spec!r} {what}: {reason}") from None
