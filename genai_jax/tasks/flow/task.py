"""Normalizing flows: images from an invertible network, with their exact density."""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from genai_jax.config import Config, ConfigError, field, name_flags
from genai_jax.data.images.loader import ImageDataConfig
from genai_jax.grids import PLAIN
from genai_jax.networks.flops import count_flops
from genai_jax.networks.invertible import glow
from genai_jax.networks.invertible.glow import Glow, GlowConfig
from genai_jax.requests import ArrayRequest, EvaluateRequest
from genai_jax.sampled import Arrays
from genai_jax.tasks.arrays.data import ArrayData, marked_levels
from genai_jax.tasks.arrays.embedding import embedded
from genai_jax.tasks.arrays.sampling import (
    check_label,
    check_show_flags,
    in_batches,
    requested_labels,
)
from genai_jax.tasks.arrays.scores import ScoreFlags, score_images
from genai_jax.tasks.arrays.walks import PATHS, path, walk_labels
from genai_jax.tasks.programs import cached_program
from genai_jax.tasks.protocol import LossOutput, Mean, Phase, Task
from genai_jax.training.distributed import to_host
from genai_jax.training.optimizer import default_optimizer

START_IMAGES = 256  # that the initial scales and biases are computed from
MAX_ROWS = 12  # of a grid of walks
USES = {  # value of --show -> the flags that apply to it
    "draws": ("label", "temperature", "seed"),
    "interpolation": ("path", "columns"),
}


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    condition: str = field("none", "What the model is conditioned on.", choices=("none", "class"))


@dataclasses.dataclass(frozen=True)
class FlowRequest(ArrayRequest):
    num_samples: int = field(
        64, f"Images to sample, or walks to show, of which there are at most {MAX_ROWS}.", minimum=1
    )
    show: str = field(
        "draws", "What to show: samples, or walks between held-out images.", choices=tuple(USES)
    )
    label: str = field(
        "", "Classes to sample, comma-separated and repeated in order; all in order if empty."
    )
    temperature: float = field(1.0, "Temperature of the sampled latents.", minimum=0)
    path: str = field("linear", "Path of an interpolation.", choices=PATHS)
    columns: int = field(11, "Images per walk.", minimum=2)


@dataclasses.dataclass(frozen=True)
class FlowScoreRequest(ScoreFlags, EvaluateRequest):
    temperature: float = field(1.0, "Temperature of the sampled latents.", minimum=0)
    sample_flags: ClassVar = (*ScoreFlags.sample_flags, "temperature")


class NormalizingFlow(Task):
    """The task behind ``--task=normalizing_flow``; see `genai_jax.tasks.protocol.Task`."""

    components: ClassVar = {
        "data": ImageDataConfig,
        "normalizing_flow": FlowConfig,
        "glow": GlowConfig,
    }
    partition_rules: ClassVar = tuple((f"^model/.*{p}", axes) for p, axes in glow.PARTITION_RULES)
    loss_unit = "nats per dimension"
    sample_request = FlowRequest
    evaluate_request = FlowScoreRequest

    def __init__(self, config: Config):
        self.config, self.data = config, ArrayData(config)
        self.dtype = jnp.dtype(config.run.dtype)
        condition, flag = config.normalizing_flow.condition, "--normalizing_flow.condition"
        self.label_sizes = self.data.conditional_labels(condition, flag)
        if config.run.dtype != "float32":
            raise ConfigError(f"--dtype={config.run.dtype}: a flow is inverted only in float32")
        try:
            config.glow.check_shape(self.data.shape)
        except ValueError as error:
            raise ConfigError(name_flags(str(error), "glow", type(config.glow))) from None
        self.model = Glow(config.glow, self.label_sizes)
        self.dimensions = math.prod(self.data.shape)

    def init(self, rng: jax.Array) -> tuple[dict, dict]:
        """Scales and biases are set so that activations on training images are standardized."""
        examples = self.data.loader.examples("train", START_IMAGES)
        noise_rng, rng = jax.random.split(rng)
        x = self._dequantized(jnp.asarray(examples["image"]), noise_rng)
        return {"model": self.model.init(rng, x, examples.get("labels"))["params"]}, {}

    def phases(self, params: Any) -> tuple[Phase, ...]:
        optimizer = default_optimizer(self.config, self.partition_rules)
        return (Phase("likelihood", ("model",), self._loss, optimizer),)

    def _dequantized(self, image, rng) -> jax.Array:
        """Levels with uniform noise added, scaled to [-1, 1]."""
        x = image.astype(jnp.float32) + jax.random.uniform(rng, image.shape)
        return x * (2 / self.data.levels) - 1

    def _nats(self, params, batch, rng) -> jax.Array:
        """Upper bound on -log p of each discrete image (Theis et al. 2016, equation 3), [batch]."""
        x = self._dequantized(batch["image"], rng)
        density = self.model.apply({"params": params["model"]}, x, batch.get("labels"))
        return -density - self.dimensions * math.log(2 / self.data.levels)

    def _loss(self, params, mutables, batch, info) -> LossOutput:
        loss = jnp.mean(self._nats(params, batch, info.rng)) / self.dimensions
        return LossOutput(loss, {"bits_per_dim": loss / math.log(2)}, mutables)

    # Metrics and samples.

    def example_metrics(self, params, mutables, batch, key) -> dict[str, Mean]:
        nats, mask = self._nats(params, batch, key) / self.dimensions, batch["loss_mask"]
        return {"loss": Mean(nats * mask, mask)}

    def summarize(self, reduced, params, mutables, key) -> dict[str, float]:
        """Negative log-likelihood of the held-out images, dequantized with noise from the seed."""
        metrics = super().summarize(reduced, params, mutables, key)
        bits = metrics["loss"] / math.log(2)
        return metrics | {"bits_per_dim": bits, "images": int(reduced["loss"].weight)}

    def report(self, params, mutables, batches, request) -> dict:
        """Scores of sampled images, if requested."""
        if not request.scores_samples():
            return {}
        images, labels = self._sample_images(params, request, "")
        return score_images(self.data, images, labels, request)

    def embed(self, params, mutables, inputs) -> np.ndarray:
        """Latents of all scales, flattened, [images, dimensions]; standard normal under the model.

        Instead of noise, half a level is added to the images.
        """
        latents = functools.partial(self._latents, params)
        return embedded(self.data, inputs, latents, bool(self.label_sizes))

    @functools.cached_property
    def _latents(self):
        def latents(params, images, labels):
            x = (images.astype(jnp.float32) + 0.5) * (2 / self.data.levels) - 1
            variables = {"params": params["model"]}
            z, *_ = self.model.apply(variables, x, labels, method="forward")
            return jnp.concatenate([part.reshape(len(images), -1) for part in z], 1)

        return jax.jit(latents)

    def sample(self, params, mutables, request) -> Arrays:
        check_label(request.label, bool(self.label_sizes))
        check_show_flags(request, USES)
        columns, around = None, PLAIN
        if request.show == "draws":
            images, labels = self._sample_images(params, request, request.label)
        else:
            (images, labels), columns = self._interpolate(params, request), request.columns
            around = walk_labels(self.data, labels, columns)
        name = request.show + f"_seed{request.seed}" * ("seed" in USES[request.show])
        return self.data.sampled(name, images, labels, columns=columns, around=around)

    def paint(self, params, latents, labels) -> jax.Array:
        """Latents of each scale -> images in levels; see `marked_levels`."""
        variables = {"params": params["model"]}
        x = self.model.apply(variables, latents, labels, method="inverse")
        top = self.data.levels - 1  # the bin that contains a value of [-1, 1]
        return marked_levels(x, jnp.clip(jnp.floor((x + 1) / 2 * self.data.levels), 0, top))

    def _sample_images(self, params, request, label: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Images, uint8 levels [n, height, width, channels], and their requested labels."""
        count, temperature = request.num_samples, request.temperature
        labels = requested_labels(self.data.loader, label, count) if self.label_sizes else None

        def build():
            @functools.partial(jax.jit, static_argnums=3)
            def sample_batch(params, labels, key, rows):
                shapes = self.model.latent_shapes(self.data.shape)
                keys = jax.random.split(key, len(shapes))
                latents = [
                    temperature * jax.random.normal(k, (rows, *shape))
                    for k, shape in zip(keys, shapes, strict=True)
                ]
                return self.paint(params, latents, labels)

            return sample_batch

        program = functools.partial(cached_program(self, ("samples", temperature), build), params)
        return in_batches(program, jax.random.key(request.seed), count, labels), labels

    def _interpolate(self, params, request) -> tuple[np.ndarray, np.ndarray | None]:
        """Walks from one held-out image to another through their latents, one per row.

        Returns images and, if the model is conditioned on classes, their labels.
        """
        rows = min(request.num_samples, MAX_ROWS)
        held_out = self.data.loader.examples("validation", 2 * rows)
        rows = len(held_out["image"]) // 2
        labels = held_out["labels"] if self.label_sizes else None

        of_rows = None if labels is None else np.repeat(labels[:rows], request.columns, 0)

        @jax.jit
        def walk(params, image, labels):
            x = self._dequantized(image, jax.random.key(0))
            variables = {"params": params["model"]}
            latents, *_ = self.model.apply(variables, x, labels, method="forward")
            paths = [path(z[:rows], z[rows : 2 * rows], request.columns, request.path)
                    for z in latents]  # fmt: skip
            flat = [jnp.moveaxis(w, 0, 1).reshape(-1, *w.shape[2:]) for w in paths]
            return self.paint(params, flat, of_rows)

        return to_host(walk(params, held_out["image"], labels)), of_rows

    def flops_per_step(self) -> dict:
        rows = self.config.data.batch_size
        x = jax.ShapeDtypeStruct((rows, *self.data.shape), jnp.float32)
        labels = jax.ShapeDtypeStruct((rows, max(1, len(self.label_sizes))), jnp.int32)
        variables = jax.eval_shape(self.model.init, jax.random.key(0), x, labels)
        return {
            "flops_per_step": 3 * count_flops(self.model.apply, variables, x, labels),
            "convention": "3 x forward matmuls and convolutions; no determinants",
        }
