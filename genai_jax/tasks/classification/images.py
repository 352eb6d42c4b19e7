"""Image classification, also for the features that scores of samples use."""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from genai_jax.config import Config, ConfigError, field
from genai_jax.data.images.loader import ImageDataConfig
from genai_jax.networks.flops import count_flops
from genai_jax.networks.image import classifier
from genai_jax.networks.image.classifier import Classifier, ClassifierConfig
from genai_jax.requests import ExactEvaluateRequest
from genai_jax.tasks.arrays.data import ArrayData
from genai_jax.tasks.arrays.embedding import embedded, in_parts
from genai_jax.tasks.arrays.other_runs import open_fitting
from genai_jax.tasks.protocol import LossOutput, Mean, Params, Phase, Task
from genai_jax.training.optimizer import default_optimizer
from genai_jax.training.restore import restore_model


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    shift: int = field(0, "Maximum random shift of a training example, in pixels.", minimum=0)
    noise: float = field(
        0.0, "Standard deviation of the noise added to training examples.", minimum=0
    )
    label_smoothing: float = field(
        0.0, "Probability spread over all classes.", minimum=0, maximum=1
    )


class ImageClassifier(Task):
    """The task behind ``--task=image_classifier``; see `genai_jax.tasks.protocol.Task`."""

    components: ClassVar = {
        "data": ImageDataConfig,
        "classifier": ClassifierConfig,
        "augment": AugmentConfig,
    }
    partition_rules: ClassVar = tuple(
        (f"^model/.*{path}$", axes) for path, axes in classifier.PARTITION_RULES
    )
    loss_unit = "nats per image"
    evaluate_request = ExactEvaluateRequest

    def __init__(self, config: Config):
        self.config, self.data = config, ArrayData(config)
        self.dtype = jnp.dtype(config.run.dtype)
        if not self.data.label_sizes:
            raise ConfigError(f"--data.dataset={config.data.dataset} has no labels to learn")
        self.model = Classifier(config.classifier, self.data.label_sizes, self.dtype)

    def init(self, key: jax.Array) -> tuple[Params, dict]:
        x = jnp.zeros((1, *self.data.shape))
        return {"model": self.model.init(key, x)["params"]}, {}

    def phases(self, params: Params) -> tuple[Phase, ...]:
        optimizer = default_optimizer(self.config, self.partition_rules)
        return (Phase("classify", ("model",), self._loss, optimizer),)

    def _loss(self, params, mutables, batch, info) -> LossOutput:
        augment_rng, dropout = jax.random.split(info.rng)
        x = self._augment(self.data.scaled(batch["image"]), augment_rng)
        losses, correct = self._scores(params, x, batch["labels"], {"dropout": dropout})
        accuracy = jnp.mean(jnp.all(correct, 1))
        return LossOutput(jnp.mean(losses), {"accuracy": accuracy}, mutables)

    def _scores(self, params, x, labels, rngs=None):
        """Cross-entropy summed over attributes [batch]; correct predictions [batch, attributes]."""
        _, logits = self.model.apply({"params": params["model"]}, x, rngs=rngs)
        smoothing = self.config.augment.label_smoothing if rngs else 0.0
        losses, correct = 0.0, []
        for i, values in enumerate(logits):
            targets = jax.nn.one_hot(labels[:, i], values.shape[-1])
            targets = optax.smooth_labels(targets, smoothing)
            losses = losses + optax.softmax_cross_entropy(values, targets)
            correct.append(jnp.argmax(values, -1) == labels[:, i])
        return losses, jnp.stack(correct, 1)

    def _augment(self, x, rng):
        augment = self.config.augment
        shift_rng, noise_rng = jax.random.split(rng)
        if augment.shift:
            x = shifted(x, shift_rng, augment.shift)
        if augment.noise:
            x = x + augment.noise * jax.random.normal(noise_rng, x.shape)
        return x

    def example_metrics(self, params, mutables, batch, key) -> dict[str, Mean]:
        x, mask = self.data.scaled(batch["image"]), batch["loss_mask"]
        losses, correct = self._scores(params, x, batch["labels"])
        metrics = {
            "loss": Mean(losses * mask, mask),
            "accuracy": Mean(jnp.all(correct, 1) * mask, mask),
        }
        if correct.shape[1] > 1:
            each = correct.T * mask
            metrics |= {f"accuracy_{i}": Mean(x, mask) for i, x in enumerate(each)}
        return metrics

    def summarize(self, reduced, params, mutables, key) -> dict[str, float]:
        """Loss in nats per image; an example is correct if all of its attributes are."""
        metrics = super().summarize(reduced, params, mutables, key)
        return metrics | {"images": int(reduced["loss"].weight)}

    def embed(self, params, mutables, inputs) -> np.ndarray:
        """Features [images, feature_dim], from which the logits are computed."""
        return embedded(self.data, inputs, functools.partial(self._features, params))

    @functools.cached_property
    def _features(self):
        return jax.jit(
            lambda params, images, labels: self.model.apply(
                {"params": params["model"]}, self.data.scaled(images)
            )[0]
        )

    def flops_per_step(self) -> dict:
        x = jax.ShapeDtypeStruct((self.config.data.batch_size, *self.data.shape), jnp.float32)
        params = jax.eval_shape(self.init, jax.random.key(0))[0]["model"]
        forward = lambda params, x: self.model.apply({"params": params}, x)
        return {
            "flops_per_step": 3 * count_flops(forward, params, x),
            "convention": "3 x forward matmuls and convolutions",
        }


def shifted(x: jax.Array, rng: jax.Array, most: int) -> jax.Array:
    """Shifts each example [batch, *space, channels] at random; edges are repeated."""
    space = x.shape[1:-1]
    padded = jnp.pad(x, ((0, 0), *((most, most),) * len(space), (0, 0)), mode="edge")
    starts = jax.random.randint(rng, (x.shape[0], len(space)), 0, 2 * most + 1)

    def cut(example, start):
        return jax.lax.dynamic_slice(example, (*start, 0), x.shape[1:])

    return jax.vmap(cut)(padded, starts)


Describe = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def load_classifier(workdir: str, data: ArrayData) -> Describe:
    """Restores a classifier of images like those of `data`.

    Returns:
      uint8 images [n, *space, channels] -> features [n, dim], predicted labels [n, attributes].

    Raises:
      ConfigError: there is no such run, or its images have another shape or other labels.
    """
    config = open_fitting(ImageClassifier, workdir, "--classifier", data)
    task = ImageClassifier(config)
    if task.data.label_sizes != data.label_sizes:
        raise ConfigError(
            f"--classifier={workdir} predicts labels of sizes {task.data.label_sizes}, but "
            f"--data.dataset={data.loader.config.dataset} has {data.label_sizes}"
        )
    params = restore_model(task, config).params

    @jax.jit
    def describe(params, images):
        features, logits = task.model.apply({"params": params["model"]}, task.data.scaled(images))
        return features, jnp.stack([jnp.argmax(x, -1) for x in logits], 1)

    return lambda images: tuple(in_parts(functools.partial(describe, params), images))
