"""Scores of a diffusion model beyond its loss: exact likelihood, and of the images it draws."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from genai_jax.config import ConfigError, field, override
from genai_jax.diffusion.likelihood import log_density
from genai_jax.networks.image.conditioning import Condition
from genai_jax.requests import EvaluateRequest
from genai_jax.tasks.arrays.drawing import in_turn, requested_labels
from genai_jax.tasks.arrays.scores import ScoreFlags, score_images
from genai_jax.tasks.diffusion.sampling import Drawer, Overrides


@dataclasses.dataclass(frozen=True)
class ScoreRequest(Overrides, ScoreFlags, EvaluateRequest):
    likelihood: str = field(
        "none", "log-density by the probability-flow ODE, with exact or estimated divergence",
        choices=("none", "exact", "hutchinson"),
    )  # fmt: skip
    likelihood_steps: int = field(100, "steps of that ODE", minimum=1)
    likelihood_probes: int = field(1, "random directions of a Hutchinson estimate", minimum=1)
    drawing: ClassVar = (*ScoreFlags.drawing, *(f.name for f in dataclasses.fields(Overrides)))


def score(task: Any, params: dict, batches: Callable, request: ScoreRequest) -> dict:
    """What the request asks for: bits per dimension, and the scores of drawn images."""
    scores = {}
    if request.likelihood != "none":
        scores |= likelihood(task, params, batches(request.batches), request)
    if request.draws():
        sampler = override(task.config.sampler, request)
        labels, condition = _held_out_condition(task, request.num_samples)
        drawer = Drawer(task, params, sampler)
        images, _ = drawer.draw(jax.random.key(request.seed), len(labels), condition)
        scores |= score_images(task.loader, images, labels, request)
        scores |= {n: getattr(sampler, n) for n in ("solver", "steps", "guidance")}
    return scores


def _held_out_condition(task, count: int) -> tuple[np.ndarray | None, Condition]:
    """What is asked for, and the labels that it stands for: every class in turn, or captions."""
    kind = task.config.diffusion.condition
    if kind == "class":
        labels = requested_labels(task.loader, "", count)
        return labels, task.condition(labels=labels)
    if kind == "text":
        examples = task.loader.examples("validation", count)
        tokens, mask = task.loader.encode_captions(examples["caption"])
        unlabelled = np.zeros((len(tokens), 0), np.int32)
        labels, tokens, mask = (
            in_turn(x, count) for x in (examples.get("labels", unlabelled), tokens, mask)
        )
        return labels, task.condition(tokens=tokens, token_mask=mask)
    return np.zeros((count, 0), np.int32), Condition()


def likelihood(task: Any, params: dict, batches, request: ScoreRequest) -> dict:
    """Bits per dimension of held-out images through the probability-flow ODE.

    The images are dequantized with uniform noise, so this is an upper bound of their discrete
    negative log-likelihood (Theis et al. 2016, equation 3); the density itself is exact up to the
    solver, and up to the estimate of the divergence if that is chosen.
    """
    if task.latents:
        raise ConfigError("--likelihood is of images; this model's density is that of latents")
    bin_width = 2 / (task.loader.levels - 1)

    @jax.jit
    def nats(params, batch, key):
        noise_key, probe_key = jax.random.split(key)
        x = task.scaled(batch["image"])
        x = x + bin_width * jax.random.uniform(noise_key, x.shape, minval=-0.5, maxval=0.5)
        density = log_density(
            task.denoiser(params, task.condition_of(batch)), task.schedule(params), x,
            steps=request.likelihood_steps, divergence=request.likelihood, key=probe_key,
            num_probes=request.likelihood_probes,
        )  # fmt: skip
        discrete = density + x[0].size * math.log(bin_width)
        mask = batch["loss_mask"]
        return jnp.sum(discrete * mask), jnp.sum(mask)

    key = jax.random.key(request.seed)
    sums = [nats(params, batch, jax.random.fold_in(key, i)) for i, batch in enumerate(batches)]
    total, count = np.sum(np.asarray(jax.device_get(sums), np.float64), 0)
    dimensions = math.prod(task.loader.shape)
    return {
        "ode_bits_per_dim": -total / count / dimensions / math.log(2),
        "ode_divergence": request.likelihood,
        "ode_images": int(count),
    }
