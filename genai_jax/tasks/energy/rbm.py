"""Restricted Boltzmann machines on binarized images, by persistent contrastive divergence."""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from genai_jax.config import Config, field
from genai_jax.data.images.loader import ImageDataConfig
from genai_jax.losses.likelihoods import Bernoulli
from genai_jax.networks.energy import rbm
from genai_jax.requests import ArrayRequest, EvaluateRequest
from genai_jax.sampled import Arrays
from genai_jax.tasks.arrays.data import ArrayData
from genai_jax.tasks.arrays.embedding import embedded
from genai_jax.tasks.arrays.scores import ScoreFlags, score_images
from genai_jax.tasks.programs import cached_program
from genai_jax.tasks.protocol import LossOutput, Mean, Phase, Task
from genai_jax.training.distributed import to_host
from genai_jax.training.optimizer import default_optimizer

MEASURED_IMAGES = 2048  # that the initial visible biases are computed from


@dataclasses.dataclass(frozen=True)
class RbmConfig:
    num_hidden: int = field(128, "Hidden units.", minimum=1)
    chains: int = field(128, "Persistent Gibbs chains.", minimum=1)
    sweeps: int = field(5, "Gibbs sweeps of the persistent chains per step.", minimum=1)
    ais_chains: int = field(
        512, "Chains of annealed importance sampling, which estimates the normalizer.", minimum=2,
        changeable=True,
    )  # fmt: skip
    ais_temperatures: int = field(
        2000, "Temperatures of annealed importance sampling.", minimum=2, changeable=True
    )


@dataclasses.dataclass(frozen=True)
class RbmRequest(ArrayRequest):
    num_samples: int = field(64, "Images to sample.", minimum=1)
    sweeps: int = field(1000, "Gibbs sweeps, starting from the persistent chains.", minimum=1)


@dataclasses.dataclass(frozen=True)
class RbmScoreRequest(ScoreFlags, EvaluateRequest):
    sweeps: int = field(1000, "Gibbs sweeps before an image is sampled.", minimum=1)
    sample_flags: ClassVar = (*ScoreFlags.sample_flags, "sweeps")


class Rbm(Task):
    """The task behind ``--task=rbm``; see `genai_jax.tasks.protocol.Task`.

    Gray levels are probabilities of white: training binarizes an image again whenever it is used,
    evaluation with a key from the seed. Mutables are the states of the persistent chains,
    [chains, visible].
    """

    components: ClassVar = {"data": ImageDataConfig, "rbm": RbmConfig}
    partition_rules: ClassVar = tuple((f"^machine/{p}$", axes) for p, axes in rbm.PARTITION_RULES)
    loss_unit = "nats: free energy of data less that of the chains; held out: per image"
    sample_request = RbmRequest
    evaluate_request = RbmScoreRequest

    def __init__(self, config: Config):
        self.config, self.data = config, ArrayData(config)
        self.dtype = jnp.dtype(config.run.dtype)
        self.binary = Bernoulli(self.data.levels, self.data.shape[-1])
        self.num_visible = math.prod(self.data.shape)

    @functools.cached_property
    def data_mean(self) -> np.ndarray:
        """Mean of every visible unit on training images, [visible], kept away from 0 and 1."""
        images = self.data.loader.examples("train", MEASURED_IMAGES)["image"]
        mean = images.reshape(len(images), -1).mean(0) / (self.data.levels - 1)
        return np.clip(mean, 0.01, 0.99).astype(np.float32)

    def init(self, rng: jax.Array) -> tuple[dict, dict]:
        params_rng, chains_rng = jax.random.split(rng)
        shape = (self.config.rbm.chains, self.num_visible)
        chains = jax.random.bernoulli(chains_rng, self.data_mean, shape).astype(jnp.float32)
        machine = rbm.init(params_rng, self.num_visible, self.config.rbm.num_hidden, self.data_mean)
        return {"machine": machine}, {"chains": chains}

    def phases(self, params: Any) -> tuple[Phase, ...]:
        optimizer = default_optimizer(self.config, self.partition_rules)
        return (Phase("contrast", ("machine",), self._loss, optimizer),)

    def _visible(self, image, rng) -> jax.Array:
        """uint8 levels -> binary units [batch, visible]."""
        return self.binary.observe(image, rng)[1].reshape(image.shape[0], -1)

    def _loss(self, params, mutables, batch, info) -> LossOutput:
        """A loss whose gradient estimates that of -log p(data).

        The model's term comes from chains that persist from step to step (Tieleman 2008).
        """
        binary_rng, chain_rng, sweep_rng = jax.random.split(info.rng, 3)
        machine, frozen = params["machine"], jax.lax.stop_gradient(params["machine"])
        v = self._visible(batch["image"], binary_rng)
        chains, _ = rbm.gibbs(frozen, mutables["chains"], chain_rng, self.config.rbm.sweeps)
        data, model = (jnp.mean(rbm.free_energy(machine, x)) for x in (v, chains))
        _, reconstruction = rbm.sweep(frozen, v, sweep_rng)
        metrics = {
            "data_free_energy": data,
            "model_free_energy": model,
            "reconstruction_error": jnp.mean(jnp.abs(v - reconstruction)),
        }
        return LossOutput(data - model, metrics, {"chains": chains})

    # Metrics and samples.

    @functools.cached_property
    def _log_z(self):
        c = self.config.rbm
        base = jax.scipy.special.logit(self.data_mean)

        @jax.jit
        def log_z(params, key):
            return rbm.annealed_log_z(
                params["machine"], base, key, chains=c.ais_chains, temperatures=c.ais_temperatures
            )

        return log_z

    def example_metrics(self, params, mutables, batch, key) -> dict[str, Mean]:
        energy = rbm.free_energy(params["machine"], self._visible(batch["image"], key))
        mask = batch["loss_mask"]
        return {"free_energy": Mean(energy * mask, mask)}

    def summarize(self, reduced, params, mutables, key) -> dict[str, float]:
        """Log-likelihood of held-out binarized images, with the normalizer estimated by annealing.

        `loss` is in nats per image. Annealing is unbiased for Z, so it tends to underestimate log Z
        and to overestimate the likelihood; `log_z_standard_error` is the relative error of Z.
        """
        energy = reduced["free_energy"]
        log_z, error = (float(x) for x in self._log_z(params, key))
        loss = float(energy.total / energy.weight) + log_z
        return {
            "loss": loss,
            "bits_per_dim": loss / self.num_visible / math.log(2),
            "log_z": log_z,
            "log_z_standard_error": error,
            "images": int(energy.weight),
        }

    def report(self, params, mutables, batches, request) -> dict:
        """Scores of sampled images, if requested."""
        if not request.scores_samples():
            return {}
        images = self._sample_images(params, mutables, request)
        return score_images(self.data, images, None, request)

    def embed(self, params, mutables, inputs) -> np.ndarray:
        """Probabilities of the hidden units [images, hidden], given probabilities of white."""
        return embedded(self.data, inputs, functools.partial(self._hidden, params))

    @functools.cached_property
    def _hidden(self):
        def hidden(params, images, labels):
            white = images.reshape(len(images), -1) / jnp.float32(self.data.levels - 1)
            return jax.nn.sigmoid(rbm.hidden_logits(params["machine"], white))

        return jax.jit(hidden)

    def sample(self, params, mutables, request) -> Arrays:
        images = self._sample_images(params, mutables, request)
        return self.data.sampled(f"draws_seed{request.seed}", images)

    def _sample_images(self, params, mutables, request) -> np.ndarray:
        """Probabilities of white after long chains, as levels, uint8 [n, *space, channels]."""
        count, sweeps = request.num_samples, request.sweeps

        def build():
            @jax.jit
            def images(machine, chains, key):
                start = jnp.resize(chains, (count, self.num_visible))
                white = rbm.gibbs(machine, start, key, sweeps)[1]
                return self.data.to_levels(2 * white - 1)

            return images

        images, key = (
            cached_program(self, ("samples", count, sweeps), build),
            jax.random.key(request.seed),
        )
        levels = to_host(images(params["machine"], mutables["chains"], key))
        return levels.reshape(count, *self.data.shape)

    def flops_per_step(self) -> dict:
        c, rows = self.config.rbm, self.config.data.batch_size
        products = 2 * c.sweeps * c.chains + 3 * (rows + c.chains) + 2 * rows
        return {
            "flops_per_step": 2 * self.num_visible * c.num_hidden * products,
            "convention": "matmuls: 2 a Gibbs sweep of a chain, 3 a free energy and its gradient, "
            "2 a reconstruction",
        }
