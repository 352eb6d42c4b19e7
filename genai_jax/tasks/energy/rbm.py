"""Restricted Boltzmann machines on binarized images, by persistent contrastive divergence."""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from genai_jax import media
from genai_jax.config import Config, field
from genai_jax.data.images.loader import ImageDataConfig
from genai_jax.losses.likelihoods import Bernoulli
from genai_jax.networks.energy import rbm
from genai_jax.requests import EvaluateRequest, Files, SampleRequest
from genai_jax.tasks.arrays.data import ImageTask
from genai_jax.tasks.arrays.scores import ScoreFlags, score_images
from genai_jax.training.optimizer import make_optimizer
from genai_jax.training.phase import Phase
from genai_jax.training.sharding import logical_axes

MEASURED_IMAGES = 2048  # that the first visible biases are set from


@dataclasses.dataclass(frozen=True)
class RbmConfig:
    num_hidden: int = field(128, "hidden units", minimum=1)
    chains: int = field(128, "persistent Gibbs chains", minimum=1)
    sweeps: int = field(5, "of the chains in a step", minimum=1)
    ais_chains: int = field(512, "of an estimate of the normalizer", minimum=2, changeable=True)
    ais_temperatures: int = field(
        2000, "of an estimate of the normalizer", minimum=2, changeable=True
    )


@dataclasses.dataclass(frozen=True)
class RbmRequest(SampleRequest):
    num_samples: int = field(64, "images to draw", minimum=1)
    sweeps: int = field(1000, "Gibbs sweeps from the persistent chains", minimum=1)


@dataclasses.dataclass(frozen=True)
class RbmScoreRequest(ScoreFlags, EvaluateRequest):
    sweeps: int = field(1000, "Gibbs sweeps before an image is taken", minimum=1)
    drawing: ClassVar = (*ScoreFlags.drawing, "sweeps")


class Rbm(ImageTask):
    """The task behind ``--task=rbm``; see `genai_jax.training.phase.Task`.

    Grey values are the probabilities of white: binarized anew in training, by a fixed key in
    scores. Mutables are the states of the persistent chains, [chains, visible].
    """

    components: ClassVar = {"data": ImageDataConfig, "rbm": RbmConfig}
    partition_rules: ClassVar = tuple((f"^machine/{p}$", axes) for p, axes in rbm.PARTITION_RULES)
    loss_unit = "nats: free energy of data less that of the chains; eval: nats per image"
    sample_request = RbmRequest
    evaluate_request = RbmScoreRequest

    def __init__(self, config: Config):
        super().__init__(config)
        self.binary = Bernoulli(self.loader.levels, self.loader.shape[-1])
        self.num_visible = math.prod(self.loader.shape)

    @functools.cached_property
    def data_mean(self) -> np.ndarray:
        """Share of white of every visible unit, [visible], kept off 0 and 1."""
        images = self.loader.examples("train", MEASURED_IMAGES)["image"]
        mean = images.reshape(len(images), -1).mean(0) / (self.loader.levels - 1)
        return np.clip(mean, 0.01, 0.99).astype(np.float32)

    def init(self, rng: jax.Array) -> tuple[dict, dict]:
        params_rng, chains_rng = jax.random.split(rng)
        shape = (self.config.rbm.chains, self.num_visible)
        chains = jax.random.bernoulli(chains_rng, self.data_mean, shape).astype(jnp.float32)
        machine = rbm.init(params_rng, self.num_visible, self.config.rbm.num_hidden, self.data_mean)
        return {"machine": machine}, {"chains": chains}

    def phases(self, params: Any) -> tuple[Phase, ...]:
        axes = logical_axes(params, self.partition_rules)
        optimizer = make_optimizer(self.config.optimizer, self.config.train.steps, axes)
        return (Phase("contrast", ("machine",), self._loss, optimizer),)

    def _visible(self, image, rng) -> jax.Array:
        """uint8 levels -> binary units [batch, visible]."""
        return self.binary.observe(image, rng)[1].reshape(image.shape[0], -1)

    def _loss(self, params, mutables, batch, rng):
        """Its gradient is that of -log p(data), the model's part of it from the chains.

        Tieleman 2008: the chains go on from step to step.
        """
        binary_rng, chain_rng, look_rng = jax.random.split(rng, 3)
        machine, frozen = params["machine"], jax.lax.stop_gradient(params["machine"])
        v = self._visible(batch["image"], binary_rng)
        chains, _ = rbm.gibbs(frozen, mutables["chains"], chain_rng, self.config.rbm.sweeps)
        data, model = (jnp.mean(rbm.free_energy(machine, x)) for x in (v, chains))
        _, seen = rbm.sweep(frozen, v, look_rng)
        metrics = {
            "data_free_energy": data,
            "model_free_energy": model,
            "reconstruction_error": jnp.mean(jnp.abs(v - seen)),
        }
        return data - model, (metrics, {"chains": chains})

    # Scores and draws.

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

    @functools.cached_property
    def _energies(self):
        @jax.jit
        def energies(params, batch, key):
            v = self._visible(batch["image"], key)
            mask = batch["loss_mask"]
            return jnp.sum(rbm.free_energy(params["machine"], v) * mask), jnp.sum(mask)

        return energies

    def evaluate(self, params, mutables, batches, seed: int | None = None) -> dict:
        """Log-likelihood of the held-out binarized images, with the normalizer by annealing.

        `loss` is in nats an image. Annealing is right on the mean of Z, so it tends to estimate
        log Z too low and the likelihood too high; `log_z_standard_error` is that of Z, relative.
        """
        del mutables
        key = jax.random.key(self.config.run.seed if seed is None else seed)
        sums = [
            self._energies(params, batch, jax.random.fold_in(key, i))
            for i, batch in enumerate(batches)
        ]
        energy, images = np.sum(np.asarray(jax.device_get(sums), np.float64), 0)
        log_z, error = (float(x) for x in self._log_z(params, key))
        loss = energy / images + log_z
        return {
            "loss": loss,
            "bits_per_dim": loss / self.num_visible / math.log(2),
            "log_z": log_z,
            "log_z_standard_error": error,
            "images": int(images),
        }

    def score(self, params, mutables, batches, request) -> dict:
        """As `evaluate`, and scores of drawn images if asked for."""
        scores = self.evaluate(params, mutables, batches(request.batches), request.seed)
        if request.draws():
            images = self._drawn(params, mutables, request)
            scores |= score_images(self.loader, images, None, request)
        return scores

    def sample(self, params, mutables, request) -> Files:
        images = self._drawn(params, mutables, request)
        return Files(f"draws_seed{request.seed}", media.writers(images, self.loader.levels))

    def _drawn(self, params, mutables, request) -> np.ndarray:
        """Probabilities of white after long chains, as levels, uint8 [n, *space, channels]."""
        count = request.num_samples
        start = jnp.resize(mutables["chains"], (count, self.num_visible))
        run = jax.jit(lambda p, v, key: rbm.gibbs(p, v, key, request.sweeps)[1])
        white = run(params["machine"], start, jax.random.key(request.seed))
        return np.asarray(self.to_levels(2 * white - 1)).reshape(count, *self.loader.shape)

    def flops_per_step(self) -> dict:
        c, rows = self.config.rbm, self.config.data.batch_size
        products = 2 * c.sweeps * c.chains + 3 * (rows + c.chains) + 2 * rows
        return {
            "flops_per_step": 2 * self.num_visible * c.num_hidden * products,
            "convention": "matmuls: 2 a Gibbs sweep of a chain, 3 a free energy and its gradient, "
            "2 a reconstruction",
        }
