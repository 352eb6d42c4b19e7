"""A user's own pictures: ``images:PATH``, ``hf:PATH``, and ``webdataset:PATH``."""

import os
import weakref
from collections.abc import Sequence
from typing import Any

from genai_jax.config import refuse_set
from genai_jax.data.images.collection import Collection, Pictures
from genai_jax.data.images.hugging_face import read_hugging_face
from genai_jax.data.images.picture_folder import read_folder
from genai_jax.data.images.web_dataset import read_shards

READERS = {"images": read_folder, "hf": read_hugging_face, "webdataset": read_shards}

# The last collection, as long as a split of it is in use: both splits share what was read.
_last: list[tuple[Any, tuple, weakref.ref]] = []


def open_own(config: Any, split: str) -> Pictures:
    """Opens one split of a user's pictures.

    Args:
      config: an `ImageDataConfig`.
      split: "train" or "validation".

    Raises:
      ConfigError: what is there cannot be used, or a flag that it does not use.
    """
    kind = config.dataset.partition(":")[0]
    unused = ("data_dir", "num_frames") + ("image_key",) * (kind != "hf")
    refuse_set("data", config, unused, f"does not apply to {kind}:PATH")
    if _last:
        before, files, collection = _last[0]
        collection = collection()
        if collection and before == config and files == _state_of(collection.records.files):
            return Pictures(collection, split)
    collection = Collection(config, READERS[kind](config))
    if collection.records.held_out is not None:
        why = f"has no effect: {config.dataset} has its own held-out pictures"
        refuse_set("data", config, ["validation_percent"], why)
    _last[:] = [(config, _state_of(collection.records.files), weakref.ref(collection))]
    return Pictures(collection, split)


def _state_of(files: Sequence[str]) -> tuple:
    """What changes when one of these files does; those that are missing are left to the reader."""
    return tuple(
        (path, status.st_size, status.st_mtime_ns)
        for path in files
        if os.path.exists(path)
        for status in [os.stat(path)]
    )
