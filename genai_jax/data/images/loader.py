"""Batches of images: the same global batches for any number of processes."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from genai_jax.config import ConfigError, field
from genai_jax.data.images.sources import ImageSource, open_images
from genai_jax.data.shuffle import permuted
from genai_jax.data.text.sources import SPLITS
from genai_jax.data.text.tokenization import load_tokenizer

if TYPE_CHECKING:
    from genai_jax.data.prefetch import BatchIterator

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class ImageDataConfig:
    dataset: str = field("digits", "digits, shapes, moving_shapes, waves, or a TFDS name")
    batch_size: int = field(128, "examples in a step, over all devices", minimum=1)
    image_size: int | None = field(
        None, "height and width, or length; the data set's own if unset", minimum=1
    )
    num_frames: int | None = field(None, "frames of a video; 8 if unset", minimum=1)
    data_dir: str | None = field(None, "folder of prepared TFDS data sets")
    image_key: str = field("image", "TFDS feature that holds the image")
    label_key: str = field("label", "TFDS feature that holds the class; empty: no labels")
    caption_key: str = field("", "TFDS feature that holds a text; empty: no captions")
    validation_percent: int = field(
        20, "examples held out if the data has no validation split", minimum=1, maximum=50
    )
    flip: bool = field(False, "mirror every other training image")
    captions: bool = field(False, "give the captions to the task")
    tokenizer: str = field(
        "bytes", "of captions: bytes, a tokenizers .json file, or a SentencePiece .model file"
    )
    caption_length: int = field(64, "tokens of a caption; longer ones are cut", minimum=1)
    prefetch: int = field(
        4, "batches made ahead in a background thread", minimum=0, changeable=True
    )


class ImageLoader:
    """Makes rows of the global batches: all of them, or those that a process asks for.

    Args:
      config: what to read and in which shape.
      seed: decides on the order of the examples.
    """

    def __init__(self, config: ImageDataConfig, seed: int):
        self.config = config
        self._seed = seed % 2**32
        self._sources: dict[str, ImageSource] = {}
        source = self.open("train")
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
            self._sources[split] = open_images(self.config, split)
        return self._sources[split]

    def batches(self, split: str = "train", rows: Sequence[int] | None = None) -> "BatchIterator":
        """Endless shuffled batches; each pass over the examples has an order of its own.

        Args:
          split: "train" or "validation".
          rows: which rows of the global batch to make; all if None.

        Entries: image uint8 [rows, *space, channels]; loss_mask float32 [rows]; labels int32
        [rows, attributes] if there are any; with captions, tokens int32 and token_mask bool
        [rows, caption_length]. Close the iterator to end its thread.
        """
        from genai_jax.data.prefetch import BatchIterator

        made = _Shuffled(self, self.open(split), self._chosen(rows))
        return BatchIterator(made, self.config.prefetch)

    def evaluation_batches(
        self, max_batches: int = -1, rows: Sequence[int] | None = None
    ) -> Iterator[Batch]:
        """The validation split once, in order; `loss_mask` is 0 where the last batch is padded.

        Args:
          max_batches: stop after so many; -1 for the whole split.
          rows: which rows of the global batch to make; all if None.
        """
        rows = self._chosen(rows)
        source = self.open("validation")
        size = self.config.batch_size
        total = -(-len(source) // size)
        for i in range(total if max_batches < 0 else min(max_batches, total)):
            wanted = np.array([i * size + row for row in rows])
            batch = self.gather(source, np.minimum(wanted, len(source) - 1))
            yield batch | {"loss_mask": (wanted < len(source)).astype(np.float32)}

    def _chosen(self, rows: Sequence[int] | None) -> Sequence[int]:
        return range(self.config.batch_size) if rows is None else rows

    def gather(self, source: ImageSource, indices: Sequence[int]) -> Batch:
        """The examples of these indices as one batch."""
        if hasattr(source, "images") and not self.config.captions:  # all in memory
            batch = {"image": source.images[indices], "labels": source.labels[indices]}
        else:
            examples = [source[int(i)] for i in indices]
            batch = {"image": np.stack([e["image"] for e in examples])}
            if source.label_names:
                batch["labels"] = np.stack([e["labels"] for e in examples])
            if self.config.captions:
                texts = [e["caption"] for e in examples]
                batch["tokens"], batch["token_mask"] = self.encode_captions(texts)
        return batch | {"loss_mask": np.ones(len(indices), np.float32)}

    def examples(self, split: str, count: int) -> dict[str, Any]:
        """Up to `count` examples of a split, spread evenly over it: image, labels, caption."""
        source = self.open(split)
        chosen = np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int)
        found = [source[int(i)] for i in chosen]
        result = {"image": np.stack([e["image"] for e in found])}
        if source.label_names:
            result["labels"] = np.stack([e["labels"] for e in found])
        if source.has_captions:
            result["caption"] = [e["caption"] for e in found]
        return result

    def encode_captions(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and which of them are real, [captions, caption_length]."""
        length = self.config.caption_length
        tokens = np.zeros((len(texts), length), np.int32)
        mask = np.zeros((len(texts), length), bool)
        for i, text in enumerate(texts):
            ids = self.tokenizer.encode(text)[:length]
            tokens[i, : len(ids)], mask[i, : len(ids)] = ids, True
        return tokens, mask

    def parse_label(self, text: str) -> tuple[int, ...]:
        """The labels that a user means: values by name or number, attributes joined by ":"."""
        parts = text.strip().split(":")
        if len(parts) != len(self.label_names):
            said = ":".join(names[0] for names in self.label_names) or "nothing: it has no labels"
            raise ConfigError(
                f"--label={text} names {len(parts)} attribute(s); {self.config.dataset} has "
                f"{len(self.label_names)}, as in {said}"
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
        """What identifies the data of a run, for ``run.json``."""
        facts: dict[str, Any] = {
            "dataset": self.config.dataset,
            "shape": list(self.shape),
            "levels": self.levels,
            "label_sizes": list(self.label_sizes),
        }
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
        """These rows of global batch number `step`."""
        size = len(source)
        ordinals = [step * self.config.batch_size + row for row in rows]
        places = [divmod(ordinal, size) for ordinal in ordinals]
        indices = [permuted(i, size, (self._seed, epoch)) for epoch, i in places]
        batch = self.gather(source, indices)
        if self.config.flip:
            flips = np.array([_coin(self._seed, epoch, i) for epoch, i in places])
            mirrored = batch["image"][..., ::-1, :]
            wide = flips.reshape(-1, *(1,) * (batch["image"].ndim - 1))
            batch["image"] = np.where(wide, mirrored, batch["image"])
        return batch


def _coin(*seed: int) -> bool:
    """A fair coin that falls the same way whenever it is asked."""
    return bool(hashlib.blake2b(repr(seed).encode(), digest_size=1).digest()[0] & 1)


class _Shuffled:
    """Makes batch after batch; what it still has to do is one integer."""

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
