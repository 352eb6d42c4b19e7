"""What all tasks on images, signals and video share: their data, and its scale on the devices."""

import functools
from collections.abc import Iterator, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp

from genai_jax.config import Config, ConfigError
from genai_jax.data.images.loader import ImageLoader


class ImageTask:
    """The data half of a task; see `genai_jax.training.phase.Task`."""

    sample_shape: ClassVar[tuple[int, ...]]
    activation_axes: ClassVar[tuple[str, ...]] = ()
    curves: ClassVar = {}

    def __init__(self, config: Config):
        self.config = config
        self.dtype = jnp.dtype(config.run.dtype)
        self.loader = ImageLoader(config.data, config.run.seed)

    @functools.cached_property
    def batch_axes(self) -> dict[str, tuple]:
        shapes = self.batch_shapes()
        return {name: ("batch",) + (None,) * (len(x.shape) - 1) for name, x in shapes.items()}

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        data, loader = self.config.data, self.loader
        entries = {"image": (loader.shape, jnp.uint8), "loss_mask": ((), jnp.float32)}
        if loader.label_sizes:
            entries["labels"] = ((len(loader.label_sizes),), jnp.int32)
        if data.captions:
            entries["tokens"] = ((data.caption_length,), jnp.int32)
            entries["token_mask"] = ((data.caption_length,), jnp.bool_)
        return {
            name: jax.ShapeDtypeStruct((data.batch_size, *shape), dtype)
            for name, (shape, dtype) in entries.items()
        }

    def train_batches(self, rows: Sequence[int] | None = None):
        return self.loader.batches("train", rows)

    def evaluation_batches(
        self, max_batches: int, rows: Sequence[int] | None = None
    ) -> Iterator[dict]:
        return self.loader.evaluation_batches(max_batches, rows)

    def data_record(self) -> dict:
        return self.loader.fingerprint()

    def check_data(self, trained_on: dict):
        """Raises `ConfigError` if the images are not shaped and labelled as a run's data was."""
        now = self.loader.fingerprint()
        for name in ("shape", "levels", "label_sizes", "tokenizer_sha256"):
            before, after = trained_on.get(name), now.get(name)
            if name in trained_on and _plain(before) != _plain(after):
                raise ConfigError(
                    f"--data.dataset={self.config.data.dataset} has {name} {_plain(after)}, "
                    f"the checkpoint was trained with {_plain(before)}"
                )

    def pretrained(self) -> dict:
        return {}

    def tokens_per_step(self) -> None:
        return None

    def scaled(self, image: jax.Array) -> jax.Array:
        """Levels 0 .. levels - 1 to [-1, 1], float32."""
        return image.astype(jnp.float32) * (2 / (self.loader.levels - 1)) - 1

    def to_levels(self, x: jax.Array) -> jax.Array:
        """[-1, 1], clipped, to the nearest levels, uint8."""
        return jnp.round((jnp.clip(x, -1, 1) + 1) * ((self.loader.levels - 1) / 2)).astype(
            jnp.uint8
        )


def _plain(value):
    return list(value) if isinstance(value, tuple) else value
