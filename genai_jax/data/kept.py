"""Data that a run keeps in its workdir, so that it can be sampled and scored anywhere.

Held-out examples, and training examples that some families measure, are copied unless they are too
large. The copy is read instead of the data set, which may have moved or changed since. It is data
of unknown origin, like the rest of a workdir: nothing in it is taken for granted.
"""

import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from genai_jax.data.folders import say
from genai_jax.data.images.in_memory import MemoryImages
from genai_jax.errors import ConfigError
from genai_jax.files import MIB, read_bytes, read_object, unreadable, write_bytes

RECORD = "record.json"  # written last: without it, nothing is kept
MOST_BYTES = 128 * MIB  # of a split
MOST_TRAIN = 2048  # training examples
MOST_VALUES = 1 << 28  # of an example
SUFFIXES = (".json", ".model")  # of a tokenizer's file
VOCABULARY = "vocabulary.tsv"  # words and their counts, of models of words
ENCODING = ("utf-8", "surrogatepass")  # documents may hold bytes that are not UTF-8


class KeptData:
    """What a run kept.

    Args:
      folder: of the workdir.

    Attributes:
      record: what run.json says of the data.
      shape: of images, (*space, channels); None for text.
      levels: of images: values are 0 .. levels - 1.
      label_names: of images: the names of the values of each attribute.

    Raises:
      ConfigError: it cannot be read, or is not what a run keeps.
    """

    def __init__(self, folder: str | os.PathLike):
        self._folder = pathlib.Path(folder)
        content = read_object(self._folder / RECORD)
        self.record, self.about = content.get("record"), content.get("about")
        self._files = content.get("files")
        if not all(isinstance(x, dict) for x in (self.record, self.about, self._files)):
            raise self._no_record()
        self.shape = None
        if self.about:
            self._read_about(self.about)

    def _read_about(self, about: dict[str, Any]):
        shape, levels, names = (about.get(n) for n in ("shape", "levels", "label_names"))
        numbers = isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape)
        named = isinstance(names, list) and all(
            isinstance(attribute, list) and attribute and all(isinstance(n, str) for n in attribute)
            for attribute in names
        )
        if not (
            numbers and 2 <= len(shape) <= 4 and np.prod(shape, dtype=float) <= MOST_VALUES
            and type(levels) is int and 2 <= levels <= 256
            and named and type(about.get("can_flip")) is bool
            and self.record.get("shape") == shape and self.record.get("levels") == levels
        ):  # fmt: skip
            raise self._no_record()
        self.shape, self.levels = tuple(shape), levels
        self.label_names = tuple(map(tuple, names))

    def _no_record(self) -> ConfigError:
        return unreadable(self._folder / RECORD, "it is not what a run keeps of its data")

    def documents(self, name: str) -> list[str] | None:
        """The documents of a split; None if they are not kept."""
        data, ends = self._read(f"{name}.bin"), self._array(f"{name}_ends", np.int64, ())
        if data is None or ends is None:
            return None
        starts = np.concatenate([[0], ends])
        if starts[-1] != len(data) or np.any(np.diff(starts) < 0):
            raise unreadable(self._folder / f"{name}_ends.bin", "it does not fit the documents")
        try:
            return [data[i:j].decode(*ENCODING) for i, j in itertools.pairwise(starts.tolist())]
        except UnicodeDecodeError:
            raise unreadable(self._folder / f"{name}.bin", "it is not text") from None

    def images(self, split: str) -> MemoryImages | None:
        """The examples of a split; None if they are not kept."""
        images = self._array(f"{split}_images", np.uint8, self.shape)
        if images is None:
            return None
        sizes = [len(names) for names in self.label_names]
        labels = self._array(f"{split}_labels", np.int32, (len(sizes),)) if sizes else None
        captions = self.documents(f"{split}_captions")
        fits = int(images.max(initial=0)) < self.levels and len(images)
        fits = fits and (captions is None or len(captions) == len(images))
        if sizes:
            fits = fits and labels is not None and len(labels) == len(images)
            fits = fits and labels.min() >= 0 and np.all(labels.max(0) < sizes)
        if not fits:
            raise unreadable(self._folder, f"its {split} examples do not fit together")
        source = MemoryImages(
            str(self.record.get(split)), images, labels, classes=(), captions=captions,
            levels=self.levels, can_flip=self.about["can_flip"],
        )  # fmt: skip
        source.label_names = self.label_names
        return source

    def _array(self, name: str, dtype: Any, shape: tuple[int, ...]) -> np.ndarray | None:
        """The bytes of a file as an array [examples, *shape]."""
        data = self._read(f"{name}.bin")
        if data is None:
            return None
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if len(data) % size:
            raise unreadable(self._folder / f"{name}.bin", f"it does not hold arrays of {shape}")
        return (
            np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).astype(dtype).reshape(-1, *shape)
        )

    def _read(self, name: str) -> bytes | None:
        """The content of a file, which is as it was written; None if there is none."""
        if name not in self._files or not (self._folder / name).exists():
            return None
        data = read_bytes(self._folder / name, limit=MOST_BYTES)
        if hashlib.sha256(data).hexdigest() != self._files[name]:
            why = f"it is damaged; without {self._folder / RECORD}, the data set itself is read"
            raise unreadable(self._folder / name, why)
        return data


class Keeper:
    """Writes what `KeptData` reads.

    Args:
      folder: of the workdir.
      record: what run.json says of the data.
      about: of images, `shape`, `levels`, `label_names`, and `can_flip`; {} for text.
    """

    def __init__(self, folder: pathlib.Path, record: Mapping[str, Any], about: dict[str, Any]):
        self._folder, self._files = folder, {}
        self._content = {"record": record, "about": about, "files": self._files}

    def is_there(self) -> bool:
        """Whether the same data are kept already."""
        try:
            kept = KeptData(self._folder)
        except ConfigError:
            return False
        return (kept.record, kept.about) == (self._content["record"], self._content["about"])

    def documents(self, name: str, documents: Sequence[str]):
        """Keeps texts, unless they are too large."""
        parts = [document.encode(*ENCODING) for document in documents]
        size = sum(map(len, parts))
        if size > MOST_BYTES or 8 * len(parts) > MOST_BYTES:
            return self.leave_out(name, size)
        self._write(f"{name}.bin", b"".join(parts))
        self._save(f"{name}_ends", np.cumsum([len(part) for part in parts], dtype="<i8"))

    def images(self, split: str, source: Any):
        """Keeps examples of a `genai_jax.data.images.sources.ImageSource`.

        Training examples, as many as are allowed, are spread evenly, as `ImageLoader.examples`
        takes them. Held-out ones are kept if all of them are not too large.
        """
        most = MOST_BYTES // int(np.prod(source.shape))
        count = min(MOST_TRAIN, len(source), most) if split == "train" else len(source)
        if count > most:
            return self.leave_out(split, count * int(np.prod(source.shape)))
        indices = np.linspace(0, len(source) - 1, count).round().astype(int)
        read = getattr(source, "many", lambda indices: [source[int(i)] for i in indices])
        examples = read(indices)
        self._save(f"{split}_images", np.stack([e["image"] for e in examples]))
        if source.label_names:
            labels = np.stack([e["labels"] for e in examples])
            self._save(f"{split}_labels", labels.astype("<i4"))
        if source.has_captions:
            self.documents(f"{split}_captions", [e["caption"] for e in examples])

    def leave_out(self, split: str, size: int):
        """Says that a split is not kept, since it is so many bytes."""
        say(
            f"note: the {split} examples ({size / MIB:,.0f} MiB) are not copied into the workdir; "
            "to score the run elsewhere, take the data set along"
        )

    def finish(self):
        self._write(RECORD, json.dumps(self._content, indent=2).encode())

    def _save(self, name: str, array: np.ndarray):
        self._write(f"{name}.bin", np.ascontiguousarray(array).tobytes())

    def _write(self, name: str, data: bytes):
        self._folder.mkdir(parents=True, exist_ok=True)
        write_bytes(self._folder / name, data)
        self._files[name] = hashlib.sha256(data).hexdigest()


def keep_tokenizer(folder: pathlib.Path, tokenizer: str):
    """Copies the file of a tokenizer, if it has one."""
    suffix = os.path.splitext(tokenizer)[1]
    if suffix not in SUFFIXES:
        return
    target, data = folder / f"tokenizer{suffix}", read_bytes(tokenizer, limit=2 * MOST_BYTES)
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(target, data)
