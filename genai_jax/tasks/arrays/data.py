"""The data of tasks on images, signals, and video."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genai_jax.config import Config, ConfigError
from genai_jax.data.images.loader import ImageLoader
from genai_jax.data.kept import KeptData, keep_tokenizer
from genai_jax.data.own_code import is_users_own
from genai_jax.sampled import Arrays, label_texts
from genai_jax.tasks.protocol import ArraySpec, Batch


def marked_levels(x: jax.Array, levels: jax.Array) -> jax.Array:
    """The levels of x, int16; -1, which `media.checked_levels` refuses, where x is not finite."""
    return jnp.where(jnp.isfinite(x), levels, -1).astype(jnp.int16)


class ArrayData:
    """Examples [*space, channels] of uint8 levels; see `genai_jax.tasks.protocol.Data`.

    Attributes:
      loader: reads the examples.
      shape: (*space, channels).
      levels: number of levels; values are 0 .. levels - 1.
      label_sizes: number of values of each attribute of the labels; empty without labels.
    """

    def __init__(self, config: Config, reads_captions: bool = False):
        if config.data.captions and not reads_captions:
            raise ConfigError(f"--data.captions: --task={config.run.task} does not use captions")
        # Of a run that is only read, the copies in its workdir.
        place, tokenizer = config.kept.get("data.dataset"), config.place_of("data.tokenizer")
        self._config = dataclasses.replace(config.data, tokenizer=tokenizer)
        kept = KeptData(place) if place else None
        self.loader = ImageLoader(self._config, config.run.seed, kept)
        self.shape, self.levels = self.loader.shape, self.loader.levels
        self.label_sizes = self.loader.label_sizes

    @functools.cached_property
    def batch_spec(self) -> dict[str, ArraySpec]:
        config = self._config
        entries = {"image": (self.shape, jnp.uint8), "loss_mask": ((), jnp.float32)}
        if self.label_sizes:
            entries["labels"] = ((len(self.label_sizes),), jnp.int32)
        if config.captions:
            entries["tokens"] = ((config.caption_length,), jnp.int32)
            entries["token_mask"] = ((config.caption_length,), jnp.bool_)
        return {
            name: ArraySpec((config.batch_size, *shape), dtype, ("batch",) + (None,) * len(shape))
            for name, (shape, dtype) in entries.items()
        }

    def sampled(
        self, name: str, examples: np.ndarray, labels: np.ndarray | None = None, **more: Any
    ) -> Arrays:
        """What the sample command writes, in the levels and with the label names of the data.

        `more` are fields of `Arrays`.
        """
        names = self.loader.label_names
        return Arrays(name, examples, self.levels, labels, names, **more)

    def label_texts(self, labels: np.ndarray | None) -> tuple[str, ...]:
        """Labels [n, attributes] as ``--label`` takes them; () if there are none."""
        if labels is None or not labels.size:
            return ()
        return tuple(label_texts(labels, self.loader.label_names))

    def train(self, rows: Sequence[int] | None = None):
        return self.loader.batches("train", rows)

    def held_out(self, max_batches: int, rows: Sequence[int] | None = None) -> Iterator[Batch]:
        return self.loader.evaluation_batches(max_batches, rows)

    def record(self) -> dict:
        return self.loader.fingerprint()

    def keep(self, folder: pathlib.Path, record: dict) -> None:
        """Keeps the captions' tokenizer, and examples of data that are not built in."""
        keep_tokenizer(folder, self._config.tokenizer)
        if is_users_own(self._config.dataset):
            self.loader.keep(folder, record)

    def check(self, trained_on: dict) -> None:
        """Raises `ConfigError` if shapes, levels, or labels differ from those of a run's data."""
        now = self.loader.fingerprint()
        for name in ("shape", "levels", "label_sizes", "label_names", "tokenizer_sha256"):
            before, after = trained_on.get(name), now.get(name)
            if name in trained_on and _plain(before) != _plain(after):
                raise ConfigError(
                    f"--data.dataset={self._config.dataset} has {name} {_plain(after)}, but the "
                    f"checkpoint was trained with {_plain(before)}"
                )

    def scaled(self, image: jax.Array) -> jax.Array:
        """Levels 0 .. levels - 1 to [-1, 1], float32."""
        return image.astype(jnp.float32) * (2 / (self.levels - 1)) - 1

    def to_levels(self, x: jax.Array) -> jax.Array:
        """[-1, 1], clipped, to the nearest levels; see `marked_levels`."""
        return marked_levels(x, jnp.round((jnp.clip(x, -1, 1) + 1) * ((self.levels - 1) / 2)))

    def conditional_labels(self, condition: str, flag: str) -> tuple[int, ...]:
        """The label sizes for a model with this condition; () unless it is "class".

        Raises:
          ConfigError: the condition is "class" but the data has no labels; names `flag`.
        """
        if condition != "class":
            return ()
        if not self.label_sizes:
            raise ConfigError(f"{flag}=class: {self._config.dataset} has no labels")
        return self.label_sizes


def _plain(value):
    return list(value) if isinstance(value, tuple) else value
