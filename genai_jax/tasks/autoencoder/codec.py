"""Images to latents and back: the networks of an autoencoder run, independent of its data."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from genai_jax.config import Config, ConfigError, name_flags
from genai_jax.networks.latent import quantization
from genai_jax.networks.latent.autoencoder import Autoencoder

_LEARNED = ("codes", "decay", "restart_below")
QUANTIZER_FLAGS = {  # kind of latent -> the fields of `QuantizerConfig` that it uses
    "kl": (),
    "vq": _LEARNED,
    "rvq": (*_LEARNED, "codebooks"),
    "fsq": ("levels",),
}


class Bottleneck(NamedTuple):
    """Latents for the decoder, and the terms of the loss that they incur."""

    latents: jax.Array  # [batch, *small, latent_channels], float32
    kl: jax.Array  # [batch], nats; 0 unless the latent is Gaussian
    commitment: jax.Array  # [batch], mean squared distance to learned codes, or 0
    codes: jax.Array | None  # [batch, *small, codebooks] int32; None for a Gaussian latent


class Codec:
    """The encoder, bottleneck, and decoder that the flags of an autoencoder run describe.

    Args:
      config: with the components `run`, `autoencoder` and `quantizer`.
      shape: of an image, (*space, channels).

    Raises:
      ConfigError: a shape that the strides do not divide, levels that do not fit the latents, or
        flags for another kind of latent.
    """

    def __init__(self, config: Config, shape: tuple[int, ...]):
        self.config, self.quantizer = config.autoencoder, config.quantizer
        self.shape = tuple(shape)
        self._check()
        try:
            self.latent_shape = self.config.latent_shape(self.shape)
        except ValueError as error:
            message = name_flags(str(error), "autoencoder", type(self.config))
            raise ConfigError(message) from None
        self.network = Autoencoder(
            self.config, len(shape) - 1, shape[-1], config.run.attention,
            jnp.dtype(config.run.dtype),
        )  # fmt: skip

    def _check(self):
        kind, channels = self.config.latent, self.config.latent_channels
        levels = self.quantizer.level_counts
        for f in dataclasses.fields(self.quantizer):
            value = getattr(self.quantizer, f.name)
            if value != f.default and f.name not in QUANTIZER_FLAGS[kind]:
                users = " or ".join(k for k, names in QUANTIZER_FLAGS.items() if f.name in names)
                raise ConfigError(
                    f"--quantizer.{f.name}={value} is for --autoencoder.latent={users}, not {kind}"
                )
        if kind == "fsq" and len(levels) != channels:
            raise ConfigError(
                f"--quantizer.levels={self.quantizer.levels} has {len(levels)} numbers, but "
                f"--autoencoder.latent_channels={channels} must equal their count"
            )

    @property
    def code_count(self) -> int:
        """Number of codes in a codebook, or of points on the grid."""
        if self.config.latent == "fsq":
            return math.prod(self.quantizer.level_counts)
        return self.quantizer.codes

    @property
    def codebooks(self) -> int:
        """Number of codes per position; 0 for a Gaussian latent."""
        return {"kl": 0, "rvq": self.quantizer.codebooks}.get(self.config.latent, 1)

    @property
    def has_learned_codes(self) -> bool:
        """Whether the mutables hold codebooks."""
        return self.config.latent in ("vq", "rvq")

    def init(self, rng: jax.Array) -> tuple[dict, dict]:
        """Initial parameters and mutables; the latter are the codebooks, if any are learned."""
        params = self.network.init(rng, jnp.zeros((1, *self.shape)))["params"]
        if not self.has_learned_codes:
            return params, {}
        books = quantization.init_codebooks(
            self.codebooks, self.quantizer.codes, self.config.latent_channels
        )
        return params, {"codebooks": books}

    def bottleneck(
        self, params: dict, mutables: dict, x: jax.Array, rng: jax.Array | None = None
    ) -> tuple[Bottleneck, dict]:
        """Encodes images in [-1, 1], [batch, *space, channels].

        With a key, as in training, a Gaussian latent is sampled and codebooks are updated. Without
        one, the latent is its mean and codebooks do not change.
        """
        z = self.network.apply({"params": params}, x, method="encode")
        zero = jnp.zeros(x.shape[0])
        if self.config.latent == "kl":
            mean, log_variance = jnp.split(z, 2, -1)
            log_variance = jnp.clip(log_variance, -30, 20)
            if rng is not None:
                z = mean + jnp.exp(log_variance / 2) * jax.random.normal(rng, mean.shape)
            latents = mean if rng is None else z
            return Bottleneck(latents, kl_to_normal(mean, log_variance), zero, None), mutables
        q = self.quantizer
        if self.config.latent == "fsq":
            quantized = quantization.finite_scalar(z, q.level_counts)
        elif rng is None:
            quantized = quantization.quantize(mutables["codebooks"], z)
        else:
            quantized, books = quantization.quantize_and_learn(
                mutables["codebooks"], z, rng, decay=q.decay, restart_below=q.restart_below
            )
            mutables = {**mutables, "codebooks": books}
        commitment = jnp.mean(quantized.commitment, range(1, z.ndim - 1))
        return Bottleneck(quantized.vectors, zero, commitment, quantized.codes), mutables

    def encode(self, params: dict, mutables: dict, x: jax.Array) -> jax.Array:
        """Images -> latents [batch, *small, latent_channels]: means, or quantized vectors."""
        return self.bottleneck(params, mutables, x)[0].latents

    def codes(self, params: dict, mutables: dict, x: jax.Array) -> jax.Array:
        """Images -> codes [batch, *small, codebooks], int32."""
        return self.bottleneck(params, mutables, x)[0].codes

    def decode_codes(self, params: dict, mutables: dict, codes: jax.Array) -> jax.Array:
        """Codes [batch, *small, codebooks] -> images in [-1, 1]."""
        if self.config.latent == "fsq":
            z = quantization.on_grid(codes, self.quantizer.level_counts)
        else:
            z = quantization.look_up(mutables["codebooks"], codes)
        return jnp.clip(self.output(params, self.hidden(params, z)), -1, 1)

    def decode(self, params: dict, mutables: dict, z: jax.Array) -> jax.Array:
        """Latents -> images in [-1, 1].

        Latents (of another model) are first quantized to the nearest code, except with several
        codebooks, whose sums are dense enough without it.
        """
        if self.config.latent == "fsq":
            z = quantization.to_grid(z, self.quantizer.level_counts)
        elif self.config.latent == "vq":
            z = quantization.quantize(mutables["codebooks"], z).vectors
        return jnp.clip(self.output(params, self.hidden(params, z)), -1, 1)

    def hidden(self, params: dict, z: jax.Array) -> jax.Array:
        """Latents -> inputs of the last layer."""
        return self.network.apply({"params": params}, z, method="hidden")

    def output(self, params: dict, hidden: jax.Array) -> jax.Array:
        """The last layer, whose parameters are the group ``last``: -> images, not clipped."""
        return self.network.apply({"params": params}, hidden, method="output")


def kl_to_normal(mean: jax.Array, log_variance: jax.Array) -> jax.Array:
    """KL(N(mean, variance) || N(0, 1)): [batch, ...] -> nats per example, [batch]."""
    terms = jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance
    return jnp.sum(terms, range(1, mean.ndim)) / 2
