"""A split of a TFDS image data set, stored as ArrayRecord and read without TensorFlow."""

import hashlib
import json
from typing import Any

import numpy as np

from genai_jax.config import ConfigError
from genai_jax.data.images.decoding import resized
from genai_jax.data.shuffle import permuted
from genai_jax.data.text.tfds import VALIDATION_NAMES, held_out_range, prepared_builder, reason


class TfdsImages:
    """Some or all examples of a split; see `genai_jax.data.images.sources.ImageSource`.

    If the data set has no validation split, its train split is shuffled in a fixed order, and
    validation gets the beginning, train the rest.
    """

    levels = 256
    can_flip = True

    def __init__(self, config, builder: Any, tfds_split: str, part: str | None):
        self.name = f"{builder.info.full_name}[{tfds_split}]" + (f"/{part}" if part else "")
        self._config, self._part = config, part
        self._examples, self._start, self._stop = (), 0, 0
        if builder.is_prepared():  # else only shapes are asked for
            self._examples = builder.as_data_source(split=tfds_split)
            self._info = builder.info.splits[tfds_split]
            self._start, self._stop = held_out_range(
                len(self._examples), config.validation_percent, part
            )
        self.label_names = _label_names(config, builder.info.features)
        self.has_captions = bool(config.caption_key)
        height, width, channels = builder.info.features[config.image_key].shape
        if config.image_size:
            height = width = config.image_size
        if None in (height, width, channels):
            raise ConfigError(
                f"--data.image_size must be set, since the images of {config.dataset} differ in "
                "size"
            )
        self.shape = (height, width, channels)

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, index: int) -> dict:
        index += self._start
        if self._part:
            index = permuted(index, len(self._examples), seed=(0,))
        raw = self._examples[index]
        example = {"image": resized(raw[self._config.image_key], self.shape)}
        if self.label_names:
            example["labels"] = np.array([raw[self._config.label_key]], np.int32)
        if self.has_captions:
            text = raw[self._config.caption_key]
            example["caption"] = text.decode("utf-8") if isinstance(text, bytes) else str(text)
        return example

    def fingerprint(self) -> str:
        """sha256 of the name (with its version), the split, and the sizes of its shards."""
        facts = [self.name, self._start, self._stop, self._info.shard_lengths, self._info.num_bytes]
        return hashlib.sha256(json.dumps(facts, default=int).encode()).hexdigest()


def _label_names(config, features) -> tuple[tuple[str, ...], ...]:
    if not config.label_key:
        return ()
    label = features[config.label_key]
    if not hasattr(label, "names"):
        raise ConfigError(
            f"--data.label_key={config.label_key} of {config.dataset} is not a class label"
        )
    return (tuple(label.names),)


def open_tfds_images(config, split: str, *, built_in: list[str]) -> TfdsImages:
    """Opens `split` ("train" or "validation") of the TFDS data set ``config.dataset``.

    Args:
      config: an `ImageDataConfig`.
      split: "train" or "validation".
      built_in: names of the data sets that are not from TFDS, for the error of an unknown name.

    Raises:
      ConfigError: an unknown name, data that cannot be prepared, or a feature it does not have.
    """
    builder = prepared_builder(config, built_in)
    features, splits = builder.info.features, list(builder.info.splits)
    for flag in ("image_key", "label_key", "caption_key"):
        key = getattr(config, flag)
        if key and key not in features:
            raise ConfigError(
                f"--data.{flag}={key}: {config.dataset} has {', '.join(sorted(features))}"
            )
    if len(features[config.image_key].shape) != 3:
        raise ConfigError(
            f"--data.image_key={config.image_key} of {config.dataset} is not an image"
        )
    kind, channels = (
        np.dtype(features[config.image_key].np_dtype),
        features[config.image_key].shape[2],
    )
    if kind != np.uint8 or channels not in (1, 3, None):
        raise ConfigError(
            f"--data.image_key={config.image_key}: images of {config.dataset} have {channels} "
            f"channel(s) of {kind}; prepare it with 1 or 3 channels of uint8"
        )
    own = [name for name in VALIDATION_NAMES if name in splits]
    if not builder.is_prepared():
        return TfdsImages(config, builder, "train", None)
    if "train" not in splits:
        raise ConfigError(f"{config.dataset} has no train split, only {', '.join(splits)}")
    try:
        if split == "validation" and own:
            return TfdsImages(config, builder, own[0], None)
        return TfdsImages(config, builder, "train", None if own else split)
    except (NotImplementedError, OSError) as error:
        raise ConfigError(f"cannot read {config.dataset}: {reason(error)}") from None
