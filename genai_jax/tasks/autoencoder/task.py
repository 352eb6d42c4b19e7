"""Autoencoders with Gaussian or quantized latents for another model to learn.

Losses are reconstruction, perceptual distance, a weak regularization of the latents, and a patch
discriminator that trains in a separate phase (Esser et al. 2021; Rombach et al. 2022).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from genai_jax.config import Config, ConfigError, field
from genai_jax.data.images.loader import ImageDataConfig
from genai_jax.losses.adversarial import LOSSES, adaptive_weight
from genai_jax.networks.adversarial import patch_discriminator
from genai_jax.networks.adversarial.patch_discriminator import (
    DiscriminatorConfig,
    PatchDiscriminator,
)
from genai_jax.networks.flops import count_flops
from genai_jax.networks.latent import autoencoder
from genai_jax.networks.latent.autoencoder import AutoencoderConfig
from genai_jax.networks.latent.quantization import QuantizerConfig, code_counts, usage
from genai_jax.outside import check_call, load_outside, outside_name
from genai_jax.requests import ArrayRequest, ExactEvaluateRequest
from genai_jax.sampled import Arrays
from genai_jax.tasks.arrays.data import ArrayData
from genai_jax.tasks.arrays.embedding import embedded
from genai_jax.tasks.arrays.walks import PAIRS
from genai_jax.tasks.autoencoder.codec import Bottleneck, Codec
from genai_jax.tasks.autoencoder.perceptual import Perceptual
from genai_jax.tasks.protocol import LossOutput, Mean, Params, Phase, Task, Transfer
from genai_jax.training.distributed import to_host
from genai_jax.training.optimizer import make_optimizer

RECONSTRUCTION = {"l1": "l1", "l2": "mse"}  # value of the flag -> name of the metric


@dataclasses.dataclass(frozen=True)
class AutoencoderLossConfig:
    reconstruction: str = field(
        "l1",
        "Reconstruction error: absolute (l1) or squared (l2).",
        choices=tuple(RECONSTRUCTION),
        outside=outside_name,
    )
    kl_weight: float = field(
        1e-6, "Weight of the KL divergence per image value, for kl latents.", minimum=0
    )
    commitment_weight: float = field(
        0.25, "Weight of the distance to the codes, for vq and rvq latents.", minimum=0
    )
    perceptual: str = field(
        "",
        "Workdir of an image classifier whose features to compare (perceptual distance).",
        run=True,
    )
    perceptual_weight: float = field(1.0, "Weight of the perceptual distance.", minimum=0)
    discriminator_weight: float = field(
        0.0,
        "Weight of the patch discriminator, relative to the gradient of the other losses; 0: none.",
        minimum=0,
    )
    discriminator_start: int = field(
        0, "Steps before the discriminator is trained and used.", minimum=0
    )


@dataclasses.dataclass(frozen=True)
class ReconstructionRequest(ArrayRequest):
    num_samples: int = field(
        32, "Held-out images to show next to their reconstructions.", minimum=1
    )

    def __post_init__(self):
        if self.seed:
            raise ValueError(f"seed={self.seed} has no effect: reconstructions are not random")


class Autoencoder(Task):
    """The task behind ``--task=autoencoder``; see `genai_jax.tasks.protocol.Task`."""

    components: ClassVar = {
        "data": ImageDataConfig,
        "autoencoder": AutoencoderConfig,
        "quantizer": QuantizerConfig,
        "autoencoder_loss": AutoencoderLossConfig,
        "discriminator": DiscriminatorConfig,
    }
    partition_rules: ClassVar = (
        *((f"^autoencoder/.*{p}$", axes) for p, axes in autoencoder.PARTITION_RULES),
        *((f"^discriminator/{p}$", axes) for p, axes in patch_discriminator.PARTITION_RULES),
        ("^perceptual/", (...,)),  # never trained, replicated
    )
    loss_unit = "reconstruction loss"
    sample_request = ReconstructionRequest
    evaluate_request = ExactEvaluateRequest

    def __init__(self, config: Config):
        self.config, self.data = config, ArrayData(config)
        self.dtype = jnp.dtype(config.run.dtype)
        self.weights = config.autoencoder_loss
        self.codec = Codec(config, self.data.shape)
        self._check()
        self.adversarial = self.weights.discriminator_weight > 0
        self.discriminator = PatchDiscriminator(config.discriminator, self.dtype)
        workdir = config.place_of("autoencoder_loss.perceptual")
        self.perceptual = Perceptual(workdir, self.data) if workdir else None
        self.own_error = self._own_error()

    def _own_error(self) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
        """Images and reconstructions in [-1, 1] -> the error of each, [batch], of outside code."""
        flag, name = "--autoencoder_loss.reconstruction", self.weights.reconstruction
        if name in RECONSTRUCTION:
            return None
        error = load_outside(flag, name, ["__call__"])
        check_call(flag, name, error, 2, "images, reconstructions")
        images = jax.ShapeDtypeStruct((1, *self.data.shape), jnp.float32)
        shape = getattr(jax.eval_shape(error, images, images), "shape", None)
        if shape != (1,):
            raise ConfigError(f"{flag}={name} returns {shape}, not an error for each image, (1,)")
        return error

    def _check(self):
        config, weights, kind = self.config, self.weights, self.config.autoencoder.latent
        for name, used, user in (
            ("kl_weight", kind == "kl", "--autoencoder.latent=kl"),
            ("commitment_weight", kind in ("vq", "rvq"), "--autoencoder.latent=vq or rvq"),
            ("perceptual_weight", weights.perceptual, "--autoencoder_loss.perceptual"),
        ):
            value = getattr(weights, name)
            if not used and value != getattr(AutoencoderLossConfig(), name):
                raise ConfigError(f"--autoencoder_loss.{name}={value} is only for {user}")
        if not weights.discriminator_weight and (
            weights.discriminator_start or config.discriminator != DiscriminatorConfig()
        ):
            raise ConfigError(
                "flags of the discriminator are set, but --autoencoder_loss.discriminator_weight=0"
            )
        if weights.discriminator_weight and weights.discriminator_start >= config.train.steps:
            raise ConfigError(
                f"--autoencoder_loss.discriminator_start={weights.discriminator_start} is not "
                f"below --train.steps={config.train.steps}"
            )
        rows = config.data.batch_size // config.train.accumulate
        vectors = rows * math.prod(self.codec.latent_shape[:-1])
        if kind in ("vq", "rvq") and config.quantizer.codes > vectors:
            raise ConfigError(
                f"--quantizer.codes={config.quantizer.codes} is more than the {vectors} vectors of "
                f"{rows} image(s) that initialize a codebook"
            )

    # Parameters.

    def init(self, rng: jax.Array) -> tuple[dict, dict]:
        """Groups and mutables; the latter are the codebooks, if any are learned."""
        codec_rng, discriminator_rng, perceptual_rng = jax.random.split(rng, 3)
        group, mutables = self.codec.init(codec_rng)
        params = {"autoencoder": group}
        if self.adversarial:
            image = jnp.zeros((1, *self.data.shape))
            variables = self.discriminator.init(discriminator_rng, image)
            params["discriminator"] = variables["params"]
        if self.perceptual:
            params |= self.perceptual.init(perceptual_rng)
        return params, mutables

    def init_from(self) -> tuple[Transfer, ...]:
        return self.perceptual.init_from() if self.perceptual else ()

    def phases(self, params: Params) -> tuple[Phase, ...]:
        def phase(name: str, loss, start: int = 0) -> Phase:
            steps = self.config.train.steps - start
            optimizer = make_optimizer(self.config.optimizer, steps, self.partition_rules)
            if start:  # no updates before, not even weight decay
                optimizer = optax.conditionally_mask(optimizer, lambda step: step >= start)
            return Phase(name, (name,), loss, optimizer)

        phases = (phase("autoencoder", self._autoencoder_loss),)
        if not self.adversarial:
            return phases
        start = self.weights.discriminator_start
        return phase("discriminator", self._discriminator_loss, start), *phases

    # Losses.

    def _autoencoder_loss(self, params, mutables, batch, info):
        x, group = self.data.scaled(batch["image"]), params["autoencoder"]
        bottleneck, mutables = self.codec.bottleneck(group, mutables, x, info.rng)
        hidden = self.codec.hidden(group, bottleneck.latents)
        terms = self._terms(params, x, self.codec.output(group, hidden), bottleneck)
        loss = jnp.mean(self._total(terms))
        metrics = {name: jnp.mean(values) for name, values in terms.items()}
        if bottleneck.codes is not None:
            metrics |= usage(code_counts(bottleneck.codes, self.codec.code_count))
        if self.adversarial:
            adversarial, scale = self._adversarial_loss(params, x, hidden, bottleneck)
            loss += (
                self._active(info.step) * self.weights.discriminator_weight * scale * adversarial
            )
            metrics |= {"adversarial": adversarial, "adversarial_scale": scale}
        return LossOutput(loss, metrics, mutables)

    def _active(self, step: jax.Array) -> jax.Array:
        """1 once the discriminator is used, otherwise 0.

        A branch would skip its computation before that, but convolutions in one are slow on CPU.
        """
        return (step >= self.weights.discriminator_start).astype(jnp.float32)

    def _terms(self, params, x, y, bottleneck: Bottleneck) -> dict[str, jax.Array]:
        """The terms of the loss, and common measures of reconstruction error, each [batch]."""
        over = tuple(range(1, x.ndim))
        terms = {"l1": jnp.mean(jnp.abs(x - y), over), "mse": jnp.mean(jnp.square(x - y), over)}
        if self.own_error:
            terms["own"] = self.own_error(x, y)
        if self.config.autoencoder.latent == "kl":
            terms["kl"] = bottleneck.kl
        elif self.config.autoencoder.latent != "fsq":
            terms["commitment"] = bottleneck.commitment
        if self.perceptual:
            terms["perceptual"] = self.perceptual.distance(params, x, y)
        return terms

    def _total(self, terms: dict) -> jax.Array:
        """The weighted sum of the terms, without the discriminator, [batch]."""
        total = self._reconstruction_loss(terms)
        if "kl" in terms:
            total += self.weights.kl_weight * terms["kl"] / math.prod(self.data.shape)
        if "commitment" in terms:
            total += self.weights.commitment_weight * terms["commitment"]
        return total

    def _reconstruction_loss(self, terms: dict) -> jax.Array:
        """The part of the loss that depends on the reconstruction, [batch]."""
        loss = terms[RECONSTRUCTION.get(self.weights.reconstruction, "own")]
        if "perceptual" in terms:
            loss += self.weights.perceptual_weight * terms["perceptual"]
        return loss

    def _adversarial_loss(self, params, x, hidden, bottleneck) -> tuple[jax.Array, jax.Array]:
        """The generator's hinge loss, and its adaptive weight from gradients of the last layer."""
        group = params["autoencoder"]

        def adversarial(y):
            return -jnp.mean(self._verdict(params, y))

        def reconstruction(y):
            return jnp.mean(self._reconstruction_loss(self._terms(params, x, y, bottleneck)))

        def gradient(loss):
            features, rest = jax.lax.stop_gradient((hidden, group))
            paint = lambda k: self.codec.output(
                {**rest, "last": {**rest["last"], "kernel": k}}, features
            )
            return jax.grad(lambda kernel: loss(paint(kernel)))(rest["last"]["kernel"])

        scale = adaptive_weight(gradient(reconstruction), gradient(adversarial))
        return adversarial(self.codec.output(group, hidden)), scale

    def _verdict(self, params, image: jax.Array) -> jax.Array:
        return self.discriminator.apply({"params": params["discriminator"]}, image)

    def _discriminator_loss(self, params, mutables, batch, info):
        x, group = self.data.scaled(batch["image"]), params["autoencoder"]

        bottleneck, _ = self.codec.bottleneck(group, mutables, x, info.rng)
        y = self.codec.output(group, self.codec.hidden(group, bottleneck.latents))
        real, fake = self._verdict(params, x), self._verdict(params, y)
        metrics = {"real": jnp.mean(real), "fake": jnp.mean(fake)}
        loss = self._active(info.step) * LOSSES["hinge"].critic(real, fake) / 2
        return LossOutput(loss, metrics, mutables)

    # Metrics and samples.

    def example_metrics(self, params, mutables, batch, key) -> dict[str, Mean]:
        x, mask = self.data.scaled(batch["image"]), batch["loss_mask"]
        group = params["autoencoder"]
        bottleneck, _ = self.codec.bottleneck(group, mutables, x)
        y = self.codec.output(group, self.codec.hidden(group, bottleneck.latents))
        terms = self._terms(params, x, jnp.clip(y, -1, 1), bottleneck)
        terms["loss"] = self._total(terms)
        metrics = {name: Mean(values * mask, mask) for name, values in terms.items()}
        if bottleneck.codes is not None:
            count = lambda codes: code_counts(codes[None], self.codec.code_count)
            counts = jax.vmap(count)(bottleneck.codes) * mask[:, None, None]
            metrics["code_counts"] = Mean(counts, mask)
        return metrics

    def summarize(self, reduced, params, mutables, key) -> dict[str, float]:
        """Means over the held-out images, without noise in the latents; values are in [-1, 1].

        `loss` excludes the discriminator. `psnr` is computed from the mean squared error over all
        images; `kl` is in nats per image; `usage` is the fraction of codes that occur at all, and
        `perplexity` is exp(entropy) of their frequencies (means over codebooks).
        """
        counts = reduced.pop("code_counts", None)
        metrics = super().summarize(reduced, params, mutables, key)
        metrics["psnr"] = 10 * math.log10(4 / max(metrics["mse"], 1e-12))
        if counts is not None:
            metrics |= {name: float(value) for name, value in usage(counts.total).items()}
        return metrics | {"images": int(reduced["loss"].weight)}

    def encode(self, params: dict, mutables: dict, x: jax.Array) -> jax.Array:
        """Images in [-1, 1] -> latents [batch, *small, channels]: means, or quantized vectors."""
        return self.codec.encode(params["autoencoder"], mutables, x)

    def decode(self, params: dict, mutables: dict, z: jax.Array) -> jax.Array:
        """Latents -> images in [-1, 1]."""
        return self.codec.decode(params["autoencoder"], mutables, z)

    def embed(self, params, mutables, inputs) -> np.ndarray:
        """Latents [images, *small, channels]: means, or quantized vectors."""
        return embedded(self.data, inputs, functools.partial(self._latents, params, mutables))

    @functools.cached_property
    def _latents(self):
        return jax.jit(
            lambda params, mutables, images, labels: self.encode(
                params, mutables, self.data.scaled(images)
            )
        )

    def sample(self, params, mutables, request) -> Arrays:
        """Held-out images, each with its reconstruction to its right."""
        held_out = self.data.loader.examples("validation", request.num_samples)
        originals = held_out["image"]
        reconstructions = to_host(self._reconstruct(params, mutables, originals))
        pairs = np.concatenate([originals, reconstructions], -2)
        return self.data.sampled("reconstructions", pairs, held_out.get("labels"), around=PAIRS)

    @functools.cached_property
    def _reconstruct(self):
        def reconstruct(params, mutables, image):
            z = self.encode(params, mutables, self.data.scaled(image))
            return self.data.to_levels(self.decode(params, mutables, z))

        return jax.jit(reconstruct)

    def flops_per_step(self) -> dict:
        shape = (self.config.data.batch_size, *self.data.shape)
        network = self.codec.network.clone(backend="xla", dtype=jnp.float32)
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        variables = jax.eval_shape(network.init, jax.random.key(0), x)
        return {
            "flops_per_step": 3 * count_flops(network.apply, variables, x),
            "convention": "3 x forward matmuls and convolutions of the autoencoder; without the "
            "discriminator and the perceptual network",
        }
