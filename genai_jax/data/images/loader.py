"""Batches of images; the global batches are the same for any number of processes."""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from genai_jax.config import ConfigError, field
from genai_jax.data.images.sources import OWN, Example, ImageSource, open_images
from genai_jax.data.kept import Keeper, KeptData
from genai_jax.data.own_code import SPLITS, own_data
from genai_jax.data.shuffle import permuted
from genai_jax.data.text.tokenization import load_tokenizer

if TYPE_CHECKING:
    from genai_jax.data.prefetch import BatchIterator

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class ImageDataConfig:
    dataset: str = field(
        "digits",
        "Data set: digits, mnist, emoji, shapes, moving_shapes, waves, images:PATH (a folder of "
        "pictures), hf:PATH (Arrow or Parquet files), webdataset:PATH (tar files), the name of a "
        "TFDS data set, or a function of your own, as my_package.my_module:my_images.",
        path=True,
        outside=own_data,
    )
    batch_size: int = field(128, "Examples per step, over all devices.", minimum=1)
    image_size: int | None = field(
        None,
        "Height and width of an image, or length of a signal; the data set's own if unset. Other "
        "images are cropped to a centered square, which is resized to it.",
        minimum=1,
    )
    num_frames: int | None = field(None, "Frames per video; 8 if unset.", minimum=1)
    data_dir: str | None = field(None, "Folder of prepared TFDS data sets.", path=True)
    image_key: str = field(
        "image", "TFDS feature, or column of an hf data set, that holds the image."
    )
    label_key: str = field(
        "label", "TFDS feature, column, or JSON key that holds the class; empty for no labels."
    )
    caption_key: str = field(
        "",
        "TFDS feature, column, or JSON key that holds the caption. If empty, no captions of TFDS, "
        "and text or caption of other data sets.",
    )
    validation_percent: int = field(
        20,
        "Percentage of examples to hold out if the data set has no validation split.",
        minimum=1,
        maximum=50,
    )
    flip: bool = field(False, "Mirror half of the training images, chosen at random.")
    captions: bool = field(False, "Give the captions to the task.")
    tokenizer: str = field(
        "bytes",
        "Tokenizer of captions: bytes, a tokenizers .json file, or a SentencePiece .model file.",
        path=True,
    )
    caption_length: int = field(64, "Tokens per caption; longer ones are truncated.", minimum=1)
    prefetch: int = field(
        4, "Batches to prefetch in a background thread.", minimum=0, changeable=True
    )


class ImageLoader:
    """Makes the rows of global batches: all of them, or those that a process needs.

    Args:
      config: what to read and in which shape.
      seed: determines the order of the examples.
      kept: what a run kept of its data, which is read instead.
    """

    def __init__(self, config: ImageDataConfig, seed: int, kept: KeptData | None = None):
        self.config, self._kept = config, kept
        self._seed = seed % 2**32
        self._sources: dict[str, ImageSource] = {}
        if kept and kept.shape is None:
            raise ConfigError(f"--data.dataset={config.dataset}: the run kept texts, not images")
        source = kept or self.open("train")
        self.shape, self.levels = source.shape, source.levels
        self.label_names = source.label_names
        self.label_sizes = tuple(len(names) for names in source.label_names)

    @functools.cached_property
    def tokenizer(self):
        return load_tokenizer(self.config.tokenizer)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def open(self, split: str) -> ImageSource:
        if split not in self._sources:
            kept = self._kept.images(split) if self._kept else None
            self._sources[split] = kept or open_images(self.config, split)
        return self._sources[split]

    def keep(self, folder: pathlib.Path, record: dict[str, Any]):
        """Keeps examples, unless they are too large to be copied; see `KeptData`."""
        source = self.open("train")
        about = {
            "shape": list(source.shape), "levels": source.levels,
            "label_names": [list(names) for names in source.label_names],
            "can_flip": source.can_flip,
        }  # fmt: skip
        keeper = Keeper(folder, record, about)
        if not keeper.is_there():
            for split in SPLITS:
                keeper.images(split, self.open(split))
            keeper.finish()

    def batches(self, split: str = "train", rows: Sequence[int] | None = None) -> "BatchIterator":
        """Endless shuffled batches, each pass over the examples in a different order.

        Args:
          split: "train" or "validation".
          rows: which rows of the global batch to make; all if None.

        Entries: image uint8 [rows, *space, channels]; loss_mask float32 [rows]; labels int32
        [rows, attributes] if there are any; with captions, tokens int32 and token_mask bool
        [rows, caption_length]. Close the iterator to stop its thread.
        """
        from genai_jax.data.prefetch import BatchIterator

        maker = _ShuffledBatches(self, self.open(split), self._rows_or_all(rows))
        return BatchIterator(maker, self.config.prefetch)

    def evaluation_batches(
        self, max_batches: int = -1, rows: Sequence[int] | None = None
    ) -> Iterator[Batch]:
        """The validation split once, in order; `loss_mask` is 0 where the last batch is padded.

        Args:
          max_batches: stop after this many batches; -1 for the whole split.
          rows: which rows of the global batch to make; all if None.
        """
        rows = self._rows_or_all(rows)
        source = self.open("validation")
        size = self.config.batch_size
        total = -(-len(source) // size)
        for i in range(total if max_batches < 0 else min(max_batches, total)):
            indices = np.array([i * size + row for row in rows])
            batch = self.gather(source, np.minimum(indices, len(source) - 1))
            yield batch | {"loss_mask": (indices < len(source)).astype(np.float32)}

    def _rows_or_all(self, rows: Sequence[int] | None) -> Sequence[int]:
        return range(self.config.batch_size) if rows is None else rows

    def gather(self, source: ImageSource, indices: Sequence[int]) -> Batch:
        """The examples at these indices as one batch."""
        if hasattr(source, "images") and not self.config.captions:  # held in memory
            batch = {"image": source.images[indices]}
            if source.labels is not None:
                batch["labels"] = source.labels[indices]
        else:
            examples = self._examples(source, indices)
            batch = {"image": np.stack([e["image"] for e in examples])}
            if source.label_names:
                batch["labels"] = np.stack([e["labels"] for e in examples])
            if self.config.captions:
                texts = [e["caption"] for e in examples]
                batch["tokens"], batch["token_mask"] = self.encode_captions(texts)
        return batch | {"loss_mask": np.ones(len(indices), np.float32)}

    def _examples(self, source: ImageSource, indices: Sequence[int]) -> list[Example]:
        """The examples at these indices, in parallel where the source can do that."""
        if hasattr(source, "many"):
            return source.many(indices)
        return [source[int(i)] for i in indices]

    def examples(self, split: str, count: int) -> dict[str, Any]:
        """Up to `count` examples spread evenly over a split: image, labels, caption.

        Of data that are not prepared, while only shapes are asked for, a single black image.
        """
        source = self.open(split)
        if not len(source):
            blank = {"image": np.zeros((1, *source.shape), np.uint8)}
            labels = {"labels": np.zeros((1, len(source.label_names)), np.int32)}
            captions = {"caption": [""]} if source.has_captions else {}
            return blank | (labels if source.label_names else {}) | captions
        indices = np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int)
        examples = self._examples(source, indices)
        result = {"image": np.stack([e["image"] for e in examples])}
        if source.label_names:
            result["labels"] = np.stack([e["labels"] for e in examples])
        if source.has_captions:
            result["caption"] = [e["caption"] for e in examples]
        return result

    def encode_captions(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and the mask of those that are not padding, each [captions, caption_length]."""
        length = self.config.caption_length
        tokens = np.zeros((len(texts), length), np.int32)
        mask = np.zeros((len(texts), length), bool)
        for i, text in enumerate(texts):
            ids = self.tokenizer.encode(text)[:length]
            tokens[i, : len(ids)], mask[i, : len(ids)] = ids, True
        return tokens, mask

    def parse_label(self, text: str) -> tuple[int, ...]:
        """Parses labels: one value for each attribute, by name or number, separated by ":".

        Raises:
          ConfigError: too few or too many attributes, or an unknown value.
        """
        if not text.strip():
            raise ConfigError("--label has an empty part between its commas")
        parts = text.strip().split(":")
        if not self.label_names:
            raise ConfigError(f"--label={text}: {self.config.dataset} has no labels")
        if len(parts) != len(self.label_names):
            example = ":".join(names[0] for names in self.label_names)
            raise ConfigError(
                f"--label={text} names {len(parts)} attribute(s); {self.config.dataset} has "
                f"{len(self.label_names)}, as in {example}"
            )
        return tuple(map(self._parse_value, parts, self.label_names))

    def _parse_value(self, text: str, names: tuple[str, ...]) -> int:
        if text in names:
            return names.index(text)
        if text.isdigit() and int(text) < len(names):
            return int(text)
        shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
        raise ConfigError(
            f"--label={text} is not one of {shown} (or a number from 0 to {len(names) - 1})"
        )

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the data of a run; recorded in ``run.json``."""
        if self._kept:
            return self._kept.record
        facts: dict[str, Any] = {
            "dataset": self.config.dataset,
            "shape": list(self.shape),
            "levels": self.levels,
            "label_sizes": list(self.label_sizes),
        }
        name = self.config.dataset
        if self.label_names and (name.partition(":")[0] in OWN or own_data(name)):
            facts["label_names"] = [list(names) for names in self.label_names]
        if self.config.captions:
            facts["tokenizer"] = self.tokenizer.spec
            facts["tokenizer_sha256"] = self.tokenizer.fingerprint()
        for split in SPLITS:
            source = self.open(split)
            facts[split] = source.name
            facts[f"{split}_examples"] = len(source)
            facts[f"{split}_sha256"] = source.fingerprint()
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        return facts | {"sha256": digest.hexdigest()}

    def shuffled_rows(self, source: ImageSource, step: int, rows: Sequence[int]) -> Batch:
        """The given rows of global batch number `step`."""
        size = len(source)
        ordinals = [step * self.config.batch_size + row for row in rows]
        positions = [divmod(ordinal, size) for ordinal in ordinals]
        indices = [permuted(i, size, (self._seed, epoch)) for epoch, i in positions]
        batch = self.gather(source, indices)
        if self.config.flip:
            flips = np.array([_coin(self._seed, epoch, i) for epoch, i in positions])
            mirrored = batch["image"][..., ::-1, :]
            wide = flips.reshape(-1, *(1,) * (batch["image"].ndim - 1))
            batch["image"] = np.where(wide, mirrored, batch["image"])
        return batch


def _coin(*seed: int) -> bool:
    """A fair coin flip that depends only on the seed."""
    return bool(hashlib.blake2b(repr(seed).encode(), digest_size=1).digest()[0] & 1)


class _ShuffledBatches:
    """Makes shuffled batches one after another; its state is a single integer."""

    def __init__(self, loader: ImageLoader, source: ImageSource, rows: Sequence[int]):
        self._loader, self._source, self._rows = loader, source, rows
        self._step = 0

    def next_batch(self) -> Batch:
        batch = self._loader.shuffled_rows(self._source, self._step, self._rows)
        self._step += 1
        return batch

    def get_state(self) -> dict:
        return {"step": self._step}

    def set_state(self, state: dict) -> None:
        self._step = int(state["step"])
