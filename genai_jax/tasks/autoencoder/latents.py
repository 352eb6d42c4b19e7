"""Latents of an autoencoder run, as another model learns them: zero mean and unit variance."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genai_jax.tasks.autoencoder.codec import Codec
from genai_jax.tasks.autoencoder.task import Autoencoder
from genai_jax.tasks.trained_run import read_fitting, restore_to_host, zeros_like

MEASURED_IMAGES = 2048


class Latents:
    """Two groups of parameters that are never trained: `autoencoder` and `latents`, its statistics.

    They are part of the checkpoints of the run that uses them. After that the autoencoder's workdir
    is read for its flags alone.

    Args:
      workdir: of the autoencoder.
      loader: an `ImageLoader` of the images to be encoded.
      flag: that named the workdir.

    Attributes:
      shape: (*small, channels) of the latents of an image.

    Raises:
      ConfigError: there is no autoencoder in `workdir`, or one of other images.
    """

    def __init__(self, workdir: str, loader: Any, flag: str = "--diffusion.autoencoder"):
        self.config = read_fitting(workdir, flag, "autoencoder", loader)
        self.loader = loader
        self.codec = Codec(self.config, loader.shape)
        self.shape = self.codec.latent_shape

    def init(self, rng: jax.Array) -> dict:
        """The groups before they are put in place: zeros, and statistics that change nothing."""
        params, mutables = zeros_like(self.codec.init, rng)
        channels = self.shape[-1:]
        return {
            "autoencoder": {"params": params, "mutables": mutables},
            "latents": {"mean": jnp.zeros(channels), "std": jnp.ones(channels)},
        }

    def pretrained(self) -> dict:
        """The same groups as they were trained, and as measured on training images."""
        group = self.trained_group()
        mean, std = self._measured(group, Autoencoder(self.config).scaled)
        return {"autoencoder": group, "latents": {"mean": mean, "std": std}}

    def trained_group(self) -> dict:
        """The group `autoencoder` as it was trained: host arrays."""
        params, mutables = restore_to_host(Autoencoder(self.config), self.config)
        codebooks = {name: x for name, x in mutables.items() if name == "codebooks"}
        return {"params": params["autoencoder"], "mutables": codebooks}

    def _measured(self, group: dict, scaled: Callable) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each channel, over images and space."""
        rows = self.loader.config.batch_size
        images = self.loader.examples("train", MEASURED_IMAGES)["image"]
        batches = max(1, len(images) // rows)
        images = np.resize(images, (batches, rows, *self.loader.shape))  # repeats where too few
        encode = jax.jit(lambda image: self.codec.encode(**group, x=scaled(image)))
        latents = np.stack([np.asarray(encode(batch), np.float64) for batch in images])
        axes = tuple(range(latents.ndim - 1))
        std = np.maximum(latents.std(axes), 1e-6)
        return latents.mean(axes).astype(np.float32), std.astype(np.float32)

    def encode(self, params: dict, x: jax.Array) -> jax.Array:
        """Images in [-1, 1] -> normalised latents [batch, *small, channels], float32.

        Args:
          params: of the run that uses them, with the two groups.
          x: [batch, *space, channels].
        """
        z = self.codec.encode(**params["autoencoder"], x=x)
        return (z - params["latents"]["mean"]) / params["latents"]["std"]

    def decode(self, params: dict, z: jax.Array) -> jax.Array:
        """Normalised latents -> images in [-1, 1]."""
        z = z * params["latents"]["std"] + params["latents"]["mean"]
        return self.codec.decode(**params["autoencoder"], z=z)

    def shrink_mask(self, mask: jax.Array) -> jax.Array:
        """[1, *space, 1] -> [1, *small, 1]: 1 where all of the pixels are."""
        space = self.loader.shape[:-1]
        window = (1, *(n // m for n, m in zip(space, self.shape[:-1], strict=True)), 1)
        return jax.lax.reduce_window(mask, math.inf, jax.lax.min, window, window, "VALID")
