"""Variational autoencoders: dense or hierarchical, with a choice of pixel likelihoods."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from genai_jax.config import Config, ConfigError, field, name_flags
from genai_jax.data.images.loader import ImageDataConfig
from genai_jax.losses.bounds import importance_weighted, kl_with_free_bits, normal_kl
from genai_jax.losses.likelihoods import LIKELIHOODS, Likelihood, gaussian_log_density
from genai_jax.networks.flops import count_flops
from genai_jax.networks.latent import dense_vae, ladder_vae
from genai_jax.networks.latent.dense_vae import DenseVae, DenseVaeConfig
from genai_jax.networks.latent.ladder_vae import LadderVae, LadderVaeConfig
from genai_jax.networks.latent.latent_variables import Latents
from genai_jax.outside import load_outside, outside_name
from genai_jax.requests import EvaluateRequest
from genai_jax.tasks.arrays.data import ArrayData
from genai_jax.tasks.arrays.embedding import embedded
from genai_jax.tasks.arrays.scores import ScoreFlags, score_images
from genai_jax.tasks.outside_network import outside_network, partition_rules_of, with_fields
from genai_jax.tasks.protocol import LossOutput, Mean, Phase, Task
from genai_jax.tasks.vae.sampling import VaeRequest, posterior, sample_images, sample_request
from genai_jax.training.distributed import to_host
from genai_jax.training.optimizer import default_optimizer

NETWORKS = {
    "dense": (DenseVae, "dense_vae", DenseVaeConfig, dense_vae.PARTITION_RULES),
    "ladder": (LadderVae, "ladder_vae", LadderVaeConfig, ladder_vae.PARTITION_RULES),
}


@dataclasses.dataclass(frozen=True)
class VaeConfig:
    network: str = field(
        "dense",
        "Network: dense layers, or a ladder (hierarchy) of latents.",
        choices=tuple(NETWORKS),
        outside=outside_name,
    )
    likelihood: str = field(
        "categorical",
        "Likelihood of the values of an image.",
        choices=tuple(LIKELIHOODS),
        outside=outside_name,
    )
    condition: str = field("none", "What the model is conditioned on.", choices=("none", "class"))
    beta: float = field(1.0, "Weight of the KL divergence.", minimum=0)
    kl_warmup: int = field(
        0,
        "Steps over which the weight of the KL divergence rises from 0.",
        minimum=0,
        within_run=True,
    )
    free_bits: float = field(
        0.0, "Nats per latent variable (dense) or block (ladder) that are free of cost.", minimum=0
    )
    samples: int = field(
        1, "Latent samples per image; above 1, train the importance-weighted bound.", minimum=1
    )

    def __post_init__(self):
        if self.samples > 1 and (self.beta != 1 or self.kl_warmup or self.free_bits):
            raise ValueError(
                f"--vae.samples={self.samples} trains the importance-weighted bound, which has no "
                "--vae.beta, --vae.kl_warmup, or --vae.free_bits"
            )


@dataclasses.dataclass(frozen=True)
class VaeScoreRequest(ScoreFlags, EvaluateRequest):
    importance_samples: int = field(
        0, "Samples for the importance-weighted bound; 0: do not compute it.", minimum=0
    )
    temperature: float = field(1.0, "Temperature of the sampled latents.", minimum=0)
    pixels: str = field(
        "mean", "Pixel values: their mean, or a sample (draw).", choices=("mean", "draw")
    )
    sample_flags: ClassVar = (*ScoreFlags.sample_flags, "temperature", "pixels")


class Vae(Task):
    """The task behind ``--task=vae``; see `genai_jax.tasks.protocol.Task`."""

    components: ClassVar = {
        "data": ImageDataConfig,
        "vae": VaeConfig,
        "dense_vae": DenseVaeConfig,
        "ladder_vae": LadderVaeConfig,
    }
    loss_unit = "nats per dimension"
    sample_request = VaeRequest
    evaluate_request = VaeScoreRequest

    def __init__(self, config: Config):
        self.config, self.data = config, ArrayData(config)
        self.dtype = jnp.dtype(config.run.dtype)
        self.likelihood = self._likelihood()
        self.network, rules = self._network()
        self.partition_rules = (
            *((f"^vae/.*{pattern}$", axes) for pattern, axes in rules),
            ("^likelihood/", (...,)),
        )
        self.dimensions = math.prod(self.data.shape)

    def _likelihood(self) -> Likelihood:
        flag, name = "--vae.likelihood", self.config.vae.likelihood
        cls = LIKELIHOODS[name] if name in LIKELIHOODS else load_outside(flag, name)
        if not (isinstance(cls, type) and issubclass(cls, Likelihood)):
            raise ConfigError(
                f"{flag}={name} is not a subclass of genai_jax.losses.likelihoods.Likelihood"
            )
        return cls(self.data.levels, self.data.shape[-1])

    def _network(self) -> tuple[nn.Module, Sequence[tuple[str, tuple]]]:
        """The network, whose methods are those of `DenseVae`, and its partition rules."""
        config, chosen = self.config, self.config.vae
        given = dict(
            shape=self.data.shape,
            outputs_per_value=self.likelihood.outputs_per_value,
            label_sizes=self.data.conditional_labels(chosen.condition, "--vae.condition"),
        )
        if chosen.network in NETWORKS:
            network, component, _, rules = NETWORKS[chosen.network]
            self._check(component)
            return network(getattr(config, component), **given, dtype=self.dtype), rules
        self._check("")
        needs = {"label_sizes": "--vae.condition=class"} if given["label_sizes"] else {}
        network = outside_network(
            "--vae.network", chosen.network, config, given, needs, ("bottom_up", "top_down")
        )
        return network, partition_rules_of(network)

    def _check(self, component: str):
        config, chosen = self.config, self.config.vae
        for _, other, cls, _ in NETWORKS.values():
            if other != component and getattr(config, other) != cls():
                raise ConfigError(f"--{other}.* is set, but --vae.network={chosen.network}")
        if chosen.network == "ladder":
            try:
                config.ladder_vae.check_shape(self.data.shape)
            except ValueError as error:
                cls = type(config.ladder_vae)
                raise ConfigError(name_flags(str(error), "ladder_vae", cls)) from None

    # Parameters and loss.

    def init(self, rng: jax.Array) -> tuple[dict, dict]:
        labels = jnp.zeros((1, max(1, len(self.data.label_sizes))), jnp.int32)
        params = self.network.init(rng, jnp.zeros((1, *self.data.shape)), labels)["params"]
        own = self.likelihood.init()
        groups = {"vae": params} | ({"likelihood": own} if own else {})
        return groups, {}

    def phases(self, params: Any) -> tuple[Phase, ...]:
        optimizer = default_optimizer(self.config, self.partition_rules)
        return (Phase("bound", tuple(params), self._loss, optimizer),)

    def _loss(self, params, mutables, batch, info) -> LossOutput:
        c, labels = self.config.vae, batch.get("labels")
        observe_rng, rng = jax.random.split(info.rng)
        features, target = self._observe(params, batch, observe_rng)
        once = lambda rng: self._sample_terms(params, features, labels, target, rng)
        fit, kl, log_weight = jax.vmap(once)(jax.random.split(rng, c.samples))
        kl = jnp.mean(kl, 0)
        bound = jnp.mean(importance_weighted(log_weight))
        if c.samples == 1:
            bound = jnp.mean(fit) - self._kl_weight(info.step) * kl_with_free_bits(kl, c.free_bits)
        elbo = jnp.mean(fit) - jnp.mean(jnp.sum(kl, 1))
        metrics = {
            "kl": jnp.mean(jnp.sum(kl, 1)),
            "reconstruction": -jnp.mean(fit),
            "bits_per_dim": -elbo / self.dimensions / math.log(2),
        }
        return LossOutput(-bound / self.dimensions, metrics, mutables)

    def _observe(self, params, batch, rng) -> tuple[Any, jax.Array]:
        """Features of the images, and targets of the likelihood."""
        x, target = self.likelihood.observe(batch["image"], rng)
        return self.bottom_up(params, x, batch.get("labels")), target

    def _sample_terms(self, params, features, labels, target, rng) -> tuple:
        """One sample: log-likelihood [batch], KL [batch, groups], log importance weight [batch]."""
        outputs, latents = self.top_down(params, features, labels, rng)
        fit = self.likelihood.log_prob(params.get("likelihood", {}), outputs, target)
        return fit, kl_of(latents), fit + log_ratio(latents)

    def _kl_weight(self, step: jax.Array) -> jax.Array:
        """Weight of the KL divergence in step `step`, counted from 0."""
        c = self.config.vae
        if not c.kl_warmup:
            return jnp.float32(c.beta)
        return c.beta * jnp.minimum((step + 1) / c.kl_warmup, 1.0)

    # The network, as used by losses, metrics, and samples.

    def bottom_up(self, params: dict, x: jax.Array, labels: jax.Array | None) -> Any:
        """Images as the likelihood observes them -> features for `top_down`."""
        return self.network.apply({"params": params["vae"]}, x, labels, method="bottom_up")

    def top_down(
        self, params, features, labels, rng=None, *, batch: int | None = None, **options
    ) -> tuple[jax.Array, list[Latents]]:
        """Applies `DenseVae.top_down` or `LadderVae.top_down`; `rng` samples the latents."""
        return self.network.apply(
            {"params": params["vae"]},
            features,
            labels,
            batch=batch or jax.tree.leaves(features)[0].shape[0],
            method="top_down",
            rngs={} if rng is None else {"latents": rng},
            **options,
        )

    # Metrics and samples.

    def example_metrics(self, params, mutables, batch, key) -> dict[str, Mean]:
        fit, kl, _ = self._terms(params, batch, key)
        mask = batch["loss_mask"]
        return {
            "loss": Mean((kl - fit) / self.dimensions * mask, mask),
            "kl": Mean(kl * mask, mask),
            "reconstruction": Mean(-fit * mask, mask),
        }

    def summarize(self, reduced, params, mutables, key) -> dict[str, float]:
        """The evidence lower bound of the held-out images, from one latent sample of each.

        Binarization, dequantization, and latents depend on the seed. `loss` is in nats per
        dimension, `kl` and `reconstruction` are in nats per image.
        """
        metrics = super().summarize(reduced, params, mutables, key)
        bits = metrics["loss"] / math.log(2)
        return metrics | {"bits_per_dim": bits, "images": int(reduced["loss"].weight)}

    def _terms(self, params, batch, key, number=0) -> tuple:
        """Log-likelihood, KL divergence, and log importance weight of each image, [batch] each.

        Args:
          number: index of the latent sample; an image is observed the same way each time.
        """
        observe_key, key = jax.random.split(key)
        features, target = self._observe(params, batch, observe_key)
        key = jax.random.fold_in(key, number)
        fit, kl, weight = self._sample_terms(params, features, batch.get("labels"), target, key)
        return fit, jnp.sum(kl, 1), weight

    def report(self, params, mutables, batches, request) -> dict:
        """The importance-weighted bound, and scores of sampled images, if requested."""
        metrics = {}
        if request.importance_samples:
            metrics |= self._importance(params, batches, request)
        if request.scores_samples():
            key = jax.random.key(request.seed)
            images, labels = sample_images(
                self, params, key, request.num_samples, temperature=request.temperature,
                pixels=request.pixels,
            )  # fmt: skip
            metrics |= score_images(self.data, images, labels, request)
        return metrics

    def _importance(self, params, batches: Callable, request: VaeScoreRequest) -> dict:
        """Both bounds from the same samples; an image is observed the same way every time.

        By Jensen's inequality the importance-weighted bound is at least as tight as the other.
        """
        key, count = jax.random.key(request.seed), request.importance_samples
        log_weights = jax.jit(lambda *arguments: self._terms(*arguments)[2])
        weights, masks = [], []
        for i, batch in enumerate(batches(request.batches)):
            batch_key = jax.random.fold_in(key, i)
            samples = [log_weights(params, batch, batch_key, k) for k in range(count)]
            weights.append(np.asarray(to_host(samples), np.float64))
            masks.append(to_host(batch["loss_mask"]))
        weights, mask = np.concatenate(weights, 1), np.concatenate(masks)
        highest = weights.max(0)
        bound = highest + np.log(np.mean(np.exp(weights - highest), 0))
        bits = lambda nats: float(-(nats @ mask) / mask.sum() / self.dimensions / math.log(2))
        return {
            "importance_samples": count,
            "importance_bits_per_dim": bits(bound),
            "elbo_bits_per_dim": bits(weights.mean(0)),
        }

    def embed(self, params, mutables, inputs) -> np.ndarray:
        """Means of the latents of all groups, flattened, [images, dimensions]."""
        needs_labels = bool(self.network.label_sizes)
        means = functools.partial(self._means, params)
        return embedded(self.data, inputs, means, needs_labels)

    @functools.cached_property
    def _means(self):
        def means(params, images, labels):
            latents = posterior(self, params, images, labels)
            return jnp.concatenate([s.z.reshape(len(images), -1) for s in latents], 1)

        return jax.jit(means)

    def sample(self, params, mutables, request):
        del mutables
        return sample_request(self, params, request)

    def flops_per_step(self) -> dict:
        x = jax.ShapeDtypeStruct((self.config.data.batch_size, *self.data.shape), jnp.float32)
        labels = jax.ShapeDtypeStruct((x.shape[0], max(1, len(self.data.label_sizes))), jnp.int32)
        network = with_fields(self.network, dtype=jnp.float32)
        variables = jax.eval_shape(network.init, jax.random.key(0), x, labels)
        return {
            "flops_per_step": 3 * count_flops(network.apply, variables, x, labels),
            "convention": "3 x forward matmuls and convolutions, for one sample of the latents",
        }


def kl_of(latents: list[Latents]) -> jax.Array:
    """KL divergence of posterior to prior of each group, [batch, groups], nats."""
    kl = [normal_kl(s.mean, s.log_scale, s.prior_mean, s.prior_log_scale) for s in latents]
    return jnp.concatenate([jnp.sum(x, range(2, x.ndim)) for x in kl], 1)


def log_ratio(latents: list[Latents]) -> jax.Array:
    """Log-density of sampled latents under the prior minus that under the posterior, [batch]."""
    return sum(
        gaussian_log_density(s.z, s.prior_mean, s.prior_log_scale)
        - gaussian_log_density(s.z, s.mean, s.log_scale)
        for s in latents
    )
