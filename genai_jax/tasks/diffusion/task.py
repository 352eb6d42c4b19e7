"""Diffusion and flow matching on images, signals, and video, in data space or latent space."""

from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from genai_jax.config import Config, ConfigError
from genai_jax.data.images.loader import ImageDataConfig
from genai_jax.diffusion import bound, objective
from genai_jax.networks.image.conditioning import Condition
from genai_jax.networks.image.dit import DitConfig
from genai_jax.networks.image.unet import UnetConfig
from genai_jax.networks.parallel.axes import ParallelConfig
from genai_jax.outside import load_outside
from genai_jax.sampled import Arrays
from genai_jax.tasks.arrays.data import ArrayData
from genai_jax.tasks.diffusion.model import OBJECTIVES, DenoisingModel, DiffusionConfig
from genai_jax.tasks.diffusion.sampler_flags import DiffusionRequest, SamplerConfig
from genai_jax.tasks.diffusion.sampling import SampledModel, sample_request
from genai_jax.tasks.diffusion.scores import ScoreRequest, report
from genai_jax.tasks.protocol import LossOutput, Mean, Params, Phase, Task, Transfer
from genai_jax.training.optimizer import default_optimizer


class Diffusion(Task):
    """The task behind ``--task=diffusion``; see `genai_jax.tasks.protocol.Task`."""

    components: ClassVar = {
        "data": ImageDataConfig,
        "diffusion": DiffusionConfig,
        "unet": UnetConfig,
        "dit": DitConfig,
        "parallel": ParallelConfig,
        "sampler": SamplerConfig,
    }
    loss_unit = "squared error"
    evaluation_seed = 0  # so that runs with different seeds are compared on the same noise
    sample_request = DiffusionRequest
    evaluate_request = ScoreRequest

    def __init__(self, config: Config):
        self.config, self.data = config, ArrayData(config, reads_captions=True)
        self.model = DenoisingModel(config, self.data)
        self.partition_rules = self.model.partition_rules
        self.activation_axes = self.model.activation_axes

    # Parameters and loss.

    def init(self, key: jax.Array) -> tuple[Params, dict]:
        return self.model.init(key), {}

    def init_from(self) -> tuple[Transfer, ...]:
        return self.model.init_from()

    def prepare(self, params: Params) -> Params:
        return self.model.prepare(params)

    def phases(self, params: Params) -> tuple[Phase, ...]:
        trains = tuple(g for g in ("model", "schedule") if g in params)
        optimizer = default_optimizer(self.config, self.partition_rules)
        return (Phase("denoise", trains, self._loss, optimizer),)

    def _loss(self, params, mutables, batch, info) -> LossOutput:
        drop, noise, dropout = jax.random.split(info.rng, 3)
        condition = self.model.dropped(self.model.condition_of(batch), drop)
        losses, metrics = self.losses(params, batch, noise, condition, {"dropout": dropout})
        return LossOutput(jnp.mean(losses), metrics, mutables)

    def losses(self, params, batch, key, condition, rngs=None) -> tuple[jax.Array, dict]:
        """Loss of each image [batch], and metrics to log."""
        config, model = self.config.diffusion, self.model
        schedule = model.schedule(params)
        x0 = model.examples(params, batch)
        predict = model.predictor(params, condition, rngs)
        if config.objective == "bound":
            terms = bound.variational_bound(
                predict, schedule, x0, key, parameterization=config.parameterization,
                levels=self.data.levels, sigma_data=config.sigma_data,
            )  # fmt: skip
            bits = {n: bound.bits_per_dim(v, x0[0].size) for n, v in terms._asdict().items()}
            total = sum(bits.values())
            return total, {f"{n}_bits_per_dim": jnp.mean(v) for n, v in bits.items()}
        key, time_key = jax.random.split(key)
        t = model.times(time_key, x0.shape[0], schedule)
        if config.objective not in OBJECTIVES:
            return own_objective(config.objective, predict, schedule, x0, t, key), {}
        if config.objective == "flow_matching":
            return objective.flow_matching_loss(predict, schedule, x0, t, key), {}
        return objective.denoising_loss(
            predict, schedule, x0, t, key, parameterization=config.parameterization,
            weighting=config.weighting, sigma_data=config.sigma_data,
        ), {}  # fmt: skip

    # Metrics and samples.

    def example_metrics(self, params, mutables, batch, key) -> dict[str, Mean]:
        losses, _ = self.losses(params, batch, key, self.model.condition_of(batch))
        return {"loss": Mean(losses * batch["loss_mask"], batch["loss_mask"])}

    def summarize(self, reduced, params, mutables, key) -> dict[str, float]:
        """Mean loss of the held-out images; the seed determines the noise of each."""
        metrics = super().summarize(reduced, params, mutables, key)
        metrics["images"] = int(reduced["loss"].weight)
        if self.config.diffusion.objective == "bound":
            metrics["bits_per_dim"] = metrics["loss"]
        return metrics

    def report(self, params, mutables, batches: Callable, request: ScoreRequest) -> dict:
        return report(self.sampled_model(), params, batches, request)

    def sample(self, params, mutables, request: DiffusionRequest) -> Arrays:
        return sample_request(self.sampled_model(), params, request)

    def sampled_model(self) -> SampledModel:
        """What samplers need of this model."""
        return SampledModel(self.config, self.model, self._sampling_denoiser)

    def _sampling_denoiser(self, params: Params, condition: Condition, steps: int):
        del steps
        return self.model.denoiser(params, condition)

    def flops_per_step(self) -> dict:
        return self.model.flops_per_step(self.config.data.batch_size)


def own_objective(name: str, predict, schedule, x0, t, key) -> jax.Array:
    """The loss of each image, [batch], by a function from outside this project."""
    flag = "--diffusion.objective"
    losses = load_outside(flag, name)(predict, schedule, x0, t, key)
    if getattr(losses, "shape", None) != t.shape:
        returned = getattr(losses, "shape", f"a {type(losses).__name__}")
        raise ConfigError(f"{flag}={name} returns {returned}, not a loss for each image, {t.shape}")
    return losses.astype(jnp.float32)
