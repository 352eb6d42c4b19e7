"""Data that a run keeps in its workdir, so that it can be sampled and scored anywhere.

Held-out examples, and as many training examples as some families measure, are copied unless they
are too large. The copy is read instead of the data set, which may have moved or changed since.
"""

import hashlib
import io
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from genai_jax.data.images.in_memory import MemoryImages
from genai_jax.data.own_code import own_data
from genai_jax.files import MIB, parse_json, read_bytes, read_object, unreadable

RECORD = "record.json"  # written last: without it, nothing is kept
MOST_BYTES = 128 * MIB  # of a split
MOST_TRAIN = 2048  # training examples
IN_FILES = ("text", "images", "hf", "webdataset")  # data sets named with a path


class KeptData:
    """What a run kept.

    Args:
      folder: of the workdir.

    Attributes:
      record: what run.json says of the data.
      about: of images, `shape`, `levels`, `label_names`, and `can_flip`; else empty.

    Raises:
      ConfigError: it cannot be read.
    """

    def __init__(self, folder: str | os.PathLike):
        self._folder = pathlib.Path(folder)
        content = read_object(self._folder / RECORD)
        self.record, self.about = content.get("record"), content.get("about")
        self._files = content.get("files")
        if not all(isinstance(x, dict) for x in (self.record, self.about, self._files)):
            raise unreadable(self._folder / RECORD, "it is not what a run keeps of its data")

    def documents(self, split: str) -> list[str] | None:
        """The documents of a split; None if they are not kept."""
        data = self._read(f"{split}.json")
        return None if data is None else [str(document) for document in parse_json(data.decode())]

    def images(self, split: str) -> MemoryImages | None:
        """The examples of a split; None if they are not kept."""
        images = self._array(f"{split}_images.npy")
        if images is None:
            return None
        source = MemoryImages(
            str(self.record[split]),
            images,
            self._array(f"{split}_labels.npy"),
            classes=(),
            captions=self.documents(f"{split}_captions"),
            levels=self.levels,
            can_flip=self.about["can_flip"],
        )
        source.label_names = self.label_names
        return source

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.about["shape"])

    @property
    def levels(self) -> int:
        return self.about["levels"]

    @property
    def label_names(self) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(map(str, names)) for names in self.about["label_names"])

    def _array(self, name: str) -> np.ndarray | None:
        data = self._read(name)
        return None if data is None else np.load(io.BytesIO(data), allow_pickle=False)

    def _read(self, name: str) -> bytes | None:
        """The content of a file, which is as it was written; None if there is none."""
        if name not in self._files or not (self._folder / name).exists():
            return None
        data = read_bytes(self._folder / name, limit=8 * MOST_BYTES)
        if hashlib.sha256(data).hexdigest() != self._files[name]:
            why = f"it is damaged; without {self._folder / RECORD}, the data set itself is read"
            raise unreadable(self._folder / name, why)
        return data


class Keeper:
    """Writes what `KeptData` reads.

    Args:
      folder: of the workdir.
      record: what run.json says of the data.
      about: see `KeptData`.
    """

    def __init__(self, folder: pathlib.Path, record: Mapping[str, Any], about: dict[str, Any]):
        self._folder, self._files = folder, {}
        self._content = {"record": record, "about": about, "files": self._files}

    def is_there(self) -> bool:
        """Whether the same data are kept already."""
        try:
            kept = KeptData(self._folder)
        except (OSError, ValueError):
            return False
        return (kept.record, kept.about) == (self._content["record"], self._content["about"])

    def documents(self, name: str, documents: Sequence[str]):
        self._write(f"{name}.json", json.dumps(list(documents)).encode())

    def images(self, split: str, source: Any):
        """Keeps examples of a `genai_jax.data.images.sources.ImageSource`, if they are not large.

        Training examples are spread evenly, as `ImageLoader.examples` takes them.
        """
        count = min(MOST_TRAIN, len(source)) if split == "train" else len(source)
        if count * int(np.prod(source.shape)) > MOST_BYTES:
            return
        indices = np.linspace(0, len(source) - 1, count).round().astype(int)
        read = getattr(source, "many", lambda indices: [source[int(i)] for i in indices])
        examples = read(indices)
        self._save(f"{split}_images.npy", np.stack([e["image"] for e in examples]))
        if source.label_names:
            self._save(f"{split}_labels.npy", np.stack([e["labels"] for e in examples]))
        if source.has_captions:
            self.documents(f"{split}_captions", [e["caption"] for e in examples])

    def finish(self):
        self._write(RECORD, json.dumps(self._content, indent=2).encode())

    def _save(self, name: str, array: np.ndarray):
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        self._write(name, buffer.getvalue())

    def _write(self, name: str, data: bytes):
        write_bytes(self._folder / name, data)
        self._files[name] = hashlib.sha256(data).hexdigest()


def moves(dataset: str) -> bool:
    """Whether a data set is somebody's files or code, which another machine may lack."""
    return dataset.partition(":")[0] in IN_FILES or bool(own_data(dataset))


def keep_tokenizer(folder: pathlib.Path, tokenizer: str):
    """Copies the file of a tokenizer, if it has one."""
    suffix = os.path.splitext(tokenizer)[1]
    if suffix not in (".json", ".model"):
        return
    target, data = folder / f"tokenizer{suffix}", read_bytes(tokenizer, limit=8 * MOST_BYTES)
    if not target.exists() or target.read_bytes() != data:
        write_bytes(target, data)


def write_bytes(path: pathlib.Path, data: bytes):
    """Writes a file completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.write_bytes(data)
    os.replace(temporary, path)
