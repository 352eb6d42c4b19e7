"""A variational autoencoder of dense layers (Kingma and Welling 2014)."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from genai_jax.config import field
from genai_jax.networks.latent.latent_variables import Latents, sample_latents
from genai_jax.networks.layers.dense import Dense


@dataclasses.dataclass(frozen=True)
class DenseVaeConfig:
    latent_dim: int = field(16, "Number of latent variables.", minimum=1)
    hidden_dim: int = field(256, "Width of the hidden layers.", minimum=1)
    num_layers: int = field(
        2, "Hidden layers in the encoder and in the decoder; 0 for a linear model.", minimum=0
    )

    def __post_init__(self):
        if not self.num_layers and self.hidden_dim != type(self).hidden_dim:
            raise ValueError(
                f"hidden_dim={self.hidden_dim} is set, but num_layers=0 has no hidden layer"
            )


class DenseVae(nn.Module):
    """Encoder and decoder with one stage of latents [batch, latent_dim]; each is its own group.

    Attributes:
      shape: (*space, channels) of an image.
      outputs_per_value: numbers that the decoder outputs for each value of an image.
      label_sizes: number of values of each attribute to condition on; empty for none.
      dtype: dtype of the matmuls.
    """

    config: DenseVaeConfig
    shape: tuple[int, ...]
    outputs_per_value: int = 1
    label_sizes: tuple[int, ...] = ()
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        c = self.config

        def dense(features: int) -> Dense:
            return Dense((features,), use_bias=True, dtype=self.dtype)

        self.encoder = [dense(c.hidden_dim) for _ in range(c.num_layers)]
        self.posterior = dense(2 * c.latent_dim)
        self.decoder = [dense(c.hidden_dim) for _ in range(c.num_layers)]
        self.last = dense(math.prod(self.shape) * self.outputs_per_value)

    def bottom_up(self, x: jax.Array, labels: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Images in [-1, 1] -> mean and log-scale of the posterior, each [batch, latent_dim]."""
        hidden = self._with_labels(x.reshape(x.shape[0], -1), labels)
        for layer in self.encoder:
            hidden = nn.gelu(layer(hidden))
        mean, log_scale = jnp.split(self.posterior(hidden).astype(jnp.float32), 2, -1)
        return mean, jnp.clip(log_scale, -15, 10)

    def top_down(
        self,
        features: tuple | None,
        labels: jax.Array | None,
        *,
        batch: int,
        given: list[jax.Array] | None = None,
        temperature: float = 1.0,
    ) -> tuple[jax.Array, list[Latents]]:
        """Samples latents (or takes their means, without an rng named "latents") and decodes them.

        Args:
          features: the output of `bottom_up`; None to sample from the prior.
          labels: [batch, attributes].
          batch: batch size.
          given: latents of each stage to use instead of sampling.
          temperature: factor of the standard deviations.

        Returns:
          Outputs [batch, *space, channels, outputs_per_value], float32; latents of each stage.
        """
        zeros = jnp.zeros((batch, self.config.latent_dim))
        rng = self.make_rng("latents") if self.has_rng("latents") else None
        latents = sample_latents(features, (zeros, zeros), given and given[0], rng, temperature)
        hidden = self._with_labels(latents.z, labels)
        for layer in self.decoder:
            hidden = nn.gelu(layer(hidden))
        outputs = self.last(hidden).astype(jnp.float32)
        return outputs.reshape(batch, *self.shape, self.outputs_per_value), [latents]

    def _with_labels(self, x, labels):
        if not self.label_sizes:
            return x
        one_hot = [jax.nn.one_hot(labels[:, i], n) for i, n in enumerate(self.label_sizes)]
        return jnp.concatenate([x, *one_hot], -1)

    def __call__(self, x: jax.Array, labels: jax.Array | None = None) -> jax.Array:
        """Encodes and decodes without noise; used by `init`."""
        features = self.bottom_up(x, labels)
        return self.top_down(features, labels, batch=x.shape[0])[0]


# Parameter path -> logical axes; the first pattern that matches applies.
PARTITION_RULES = (
    (r"(encoder|decoder)_\d+/kernel", (None, "mlp")),
    (r"(encoder|decoder)_\d+/bias", ("mlp",)),
    (r"(posterior|last)/kernel", ("mlp", None)),
    (r"(posterior|last)/bias", (None,)),
)
