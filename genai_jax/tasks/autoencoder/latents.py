"""Latents of an autoencoder run, normalized to zero mean and unit variance for another model."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from genai_jax.tasks.arrays.data import ArrayData
from genai_jax.tasks.arrays.other_runs import best_average, open_fitting, zeros_like
from genai_jax.tasks.autoencoder.codec import Codec
from genai_jax.tasks.autoencoder.task import Autoencoder
from genai_jax.tasks.protocol import Params, Transfer
from genai_jax.training.distributed import to_host

MEASURED_IMAGES = 2048  # that the statistics are computed from


class Latents:
    """Two groups of parameters that are never trained: `autoencoder`, and its `latents` statistics.

    They are part of the run that uses them. Once it has a checkpoint, only the flags are read from
    the autoencoder's workdir.

    Args:
      workdir: folder of the autoencoder run.
      data: the images to encode.
      flag: the flag that named the workdir, for error messages.

    Attributes:
      shape: (*small, channels) of the latents of an image.

    Raises:
      ConfigError: there is no autoencoder in `workdir`, or it is for other images.
    """

    def __init__(self, workdir: str, data: ArrayData, flag: str = "--diffusion.autoencoder"):
        self._workdir, self._flag, self._data = workdir, flag, data
        self.config = open_fitting(Autoencoder, workdir, flag, data)
        self.codec = Codec(self.config, data.shape)
        self.shape = self.codec.latent_shape

    def init(self, key: jax.Array) -> Params:
        """Placeholders for the groups: zeros, and statistics of an identity."""
        params, mutables = zeros_like(self.codec.init, key)
        channels = self.shape[-1:]
        return {
            "autoencoder": {"params": params, "mutables": mutables},
            "latents": {"mean": jnp.zeros(channels), "std": jnp.ones(channels)},
        }

    def init_from(self) -> tuple[Transfer, ...]:
        """The trained group `autoencoder`."""
        average, where = best_average(self.config), (self._workdir, self._flag)
        parts = [Transfer(*where, "params/autoencoder", "params/autoencoder/params", average)]
        if self.codec.has_learned_codes:
            target = "params/autoencoder/mutables/codebooks"
            parts.append(Transfer(*where, "mutables/codebooks", target))
        return tuple(parts)

    def prepare(self, params: Params) -> Params:
        """The group `latents`, measured on training images."""
        group, data, rows = params["autoencoder"], self._data, self._data.loader.config.batch_size
        images = data.loader.examples("train", MEASURED_IMAGES)["image"]
        batches = max(1, len(images) // rows)
        images = np.resize(images, (batches, rows, *data.shape))  # repeated if there are too few
        encode = jax.jit(lambda group, image: self.codec.encode(**group, x=data.scaled(image)))
        latents = np.stack([np.asarray(to_host(encode(group, x)), np.float64) for x in images])
        axes = tuple(range(latents.ndim - 1))
        std = np.maximum(latents.std(axes), 1e-6)
        return {
            "latents": {
                "mean": jnp.asarray(latents.mean(axes), jnp.float32),
                "std": jnp.asarray(std, jnp.float32),
            }
        }

    def encode(self, params: dict, x: jax.Array) -> jax.Array:
        """Images in [-1, 1] -> normalized latents [batch, *small, channels], float32.

        Args:
          params: of the run that uses them, with the two groups.
          x: [batch, *space, channels].
        """
        z = self.codec.encode(**params["autoencoder"], x=x)
        return (z - params["latents"]["mean"]) / params["latents"]["std"]

    def decode(self, params: dict, z: jax.Array) -> jax.Array:
        """Normalized latents -> images in [-1, 1]."""
        z = z * params["latents"]["std"] + params["latents"]["mean"]
        return self.codec.decode(**params["autoencoder"], z=z)

    def shrink_mask(self, mask: jax.Array) -> jax.Array:
        """[1, *space, 1] -> [1, *small, 1]: 1 where the mask is 1 for all pixels of a latent."""
        space = self._data.shape[:-1]
        window = (1, *(n // m for n, m in zip(space, self.shape[:-1], strict=True)), 1)
        return jax.lax.reduce_window(mask, math.inf, jax.lax.min, window, window, "VALID")
