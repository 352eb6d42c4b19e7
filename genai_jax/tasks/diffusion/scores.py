"""Reports on a diffusion model beyond its loss: likelihood, and scores of its samples."""

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from genai_jax.config import ConfigError, field
from genai_jax.diffusion.likelihood import log_density
from genai_jax.networks.image.conditioning import Condition
from genai_jax.requests import EvaluateRequest
from genai_jax.tasks.arrays.sampling import cycled, requested_labels
from genai_jax.tasks.arrays.scores import ScoreFlags, score_images
from genai_jax.tasks.diffusion.model import DenoisingModel
from genai_jax.tasks.diffusion.sampler_flags import Overrides, sampler_of
from genai_jax.tasks.diffusion.sampling import SampledModel, Sampler
from genai_jax.tasks.protocol import Params
from genai_jax.training.distributed import to_host


@dataclasses.dataclass(frozen=True)
class ScoreRequest(Overrides, ScoreFlags, EvaluateRequest):
    likelihood: str = field(
        "none",
        "Log-density from the probability-flow ODE, with exact or estimated divergence.",
        choices=("none", "exact", "hutchinson"),
    )
    likelihood_steps: int = field(100, "Steps of the probability-flow ODE.", minimum=1)
    likelihood_probes: int = field(1, "Random probes of the Hutchinson estimate.", minimum=1)
    sample_flags: ClassVar = (
        *ScoreFlags.sample_flags,
        *(f.name for f in dataclasses.fields(Overrides)),
    )

    def __post_init__(self):
        super().__post_init__()
        for name, needed in (("steps", ("exact", "hutchinson")), ("probes", ("hutchinson",))):
            name = f"likelihood_{name}"
            if getattr(self, name) != getattr(type(self), name) and self.likelihood not in needed:
                raise ValueError(
                    f"{name}={getattr(self, name)} needs --likelihood={' or '.join(needed)}"
                )


def report(sampled: SampledModel, params: Params, batches: Callable, request: ScoreRequest) -> dict:
    """Bits per dimension, and scores of sampled images, as requested."""
    metrics, model = {}, sampled.model
    if request.likelihood != "none":
        metrics |= likelihood(model, params, batches(request.batches), request)
    if request.scores_samples():
        settings = sampler_of(sampled.config, request)
        labels, condition = _held_out_condition(model, request.num_samples)
        sampler = Sampler(sampled, settings)
        images, _ = sampler.sample(params, jax.random.key(request.seed), len(labels), condition)
        metrics |= score_images(model.data, images, labels, request)
        metrics |= {n: getattr(settings, n) for n in ("solver", "steps", "guidance")}
    return metrics


def _held_out_condition(model: DenoisingModel, count: int) -> tuple[np.ndarray | None, Condition]:
    """Labels and conditions of `count` samples: all classes in order, or held-out captions."""
    kind, loader = model.config.condition, model.data.loader
    if kind == "class":
        labels = requested_labels(loader, "", count)
        return labels, model.condition(labels=labels)
    if kind == "text":
        examples = loader.examples("validation", count)
        tokens, mask = loader.encode_captions(examples["caption"])
        unlabeled = np.zeros((len(tokens), 0), np.int32)
        labels, tokens, mask = (
            cycled(x, count) for x in (examples.get("labels", unlabeled), tokens, mask)
        )
        return labels, model.condition(tokens=tokens, token_mask=mask)
    return np.zeros((count, 0), np.int32), Condition()


def likelihood(model: DenoisingModel, params: Params, batches, request: ScoreRequest) -> dict:
    """Bits per dimension of held-out images, from the probability-flow ODE.

    The images are dequantized with uniform noise, so this is an upper bound on their discrete
    negative log-likelihood (Theis et al. 2016, equation 3). The density itself is exact up to the
    error of the solver and of the divergence, if that is estimated.
    """
    if model.latents:
        raise ConfigError("--likelihood is for models of images, and this is a model of latents")
    bin_width = 2 / (model.data.levels - 1)

    @jax.jit
    def nats(params, batch, key):
        noise_key, probe_key = jax.random.split(key)
        x = model.data.scaled(batch["image"])
        x = x + bin_width * jax.random.uniform(noise_key, x.shape, minval=-0.5, maxval=0.5)
        density = log_density(
            model.denoiser(params, model.condition_of(batch)), model.schedule(params), x,
            steps=request.likelihood_steps, divergence=request.likelihood, key=probe_key,
            num_probes=request.likelihood_probes,
        )  # fmt: skip
        discrete = density + x[0].size * math.log(bin_width)
        mask = batch["loss_mask"]
        return jnp.sum(discrete * mask), jnp.sum(mask)

    key = jax.random.key(request.seed)
    sums = [nats(params, batch, jax.random.fold_in(key, i)) for i, batch in enumerate(batches)]
    total, count = np.sum(np.asarray(to_host(sums), np.float64), 0)
    dimensions = math.prod(model.data.shape)
    return {
        "ode_bits_per_dim": -total / count / dimensions / math.log(2),
        "ode_divergence": request.likelihood,
        "ode_images": int(count),
    }
