"""Perceptual distance from the features of a classifier (like LPIPS, Zhang et al. 2018)."""

import jax
import jax.numpy as jnp

from genai_jax.networks.image.classifier import Classifier
from genai_jax.tasks.arrays.data import ArrayData
from genai_jax.tasks.arrays.other_runs import best_average, open_fitting, zeros_like
from genai_jax.tasks.classification.images import ImageClassifier
from genai_jax.tasks.protocol import Params, Transfer

FLAG = "--autoencoder_loss.perceptual"


class Perceptual:
    """The group `perceptual`, which is never trained: a classifier without its last layers.

    Args:
      workdir: folder of the classifier run.
      data: the images to compare.

    Raises:
      ConfigError: there is no classifier in `workdir`, or it is for other images.
    """

    def __init__(self, workdir: str, data: ArrayData):
        self._workdir, self.shape = workdir, data.shape
        self.config = open_fitting(ImageClassifier, workdir, FLAG, data)
        dtype = jnp.dtype(self.config.run.dtype)
        self.network = Classifier(self.config.classifier, (), dtype)

    def init(self, key: jax.Array) -> Params:
        """A placeholder for the group: zeros."""
        variables = zeros_like(self.network.init, key, jnp.zeros((1, *self.shape)))
        return {"perceptual": variables["params"]}

    def init_from(self) -> tuple[Transfer, ...]:
        """The trained group, without the last layers of the classifier."""
        average = best_average(self.config)
        return (Transfer(self._workdir, FLAG, "params/model", "params/perceptual", average),)

    def distance(self, params: dict, x: jax.Array, y: jax.Array) -> jax.Array:
        """Equation 1 of Zhang et al. with all weights 1, averaged over layers: [batch], 0 to 4.

        Args:
          params: of the run, with the group `perceptual`.
          x: images in [-1, 1], [batch, *space, channels].
          y: the same.
        """
        distances = [
            jnp.mean(jnp.sum(jnp.square(a - b), -1), range(1, a.ndim - 1))
            for a, b in zip(self._maps(params, x), self._maps(params, y), strict=True)
        ]
        return jnp.mean(jnp.stack(distances), 0)

    def _maps(self, params, x) -> list[jax.Array]:
        """What each block adds, normalized to unit length: [batch, *smaller, channels] each."""
        ends_block = lambda module, method: (module.name or "").endswith("_conv_b")
        _, state = self.network.apply(
            {"params": params["perceptual"]}, x, capture_intermediates=ends_block,
            mutable=["intermediates"],
        )  # fmt: skip
        maps = [m.astype(jnp.float32) for m in jax.tree.leaves(state["intermediates"])]
        return [m / jnp.sqrt(jnp.sum(jnp.square(m), -1, keepdims=True) + 1e-8) for m in maps]
