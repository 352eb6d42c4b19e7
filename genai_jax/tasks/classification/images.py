"""Telling what images show: for its own sake, and for the features that scores are made of."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from genai_jax.config import Config, ConfigError, field
from genai_jax.data.images.loader import ImageDataConfig
from genai_jax.networks.flops import count_flops
from genai_jax.networks.image import classifier
from genai_jax.networks.image.classifier import Classifier, ClassifierConfig
from genai_jax.requests import EvaluateRequest, SampleRequest
from genai_jax.tasks.arrays.data import ImageTask
from genai_jax.tasks.trained_run import read_fitting
from genai_jax.training.optimizer import make_optimizer
from genai_jax.training.phase import Phase
from genai_jax.training.restore import restore_model
from genai_jax.training.sharding import logical_axes


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    shift: int = field(0, "pixels by which a training example is moved at most", minimum=0)
    noise: float = field(0.0, "standard deviation of noise on training examples", minimum=0)
    label_smoothing: float = field(0.0, "mass spread over all classes", minimum=0, maximum=1)


class ImageClassifier(ImageTask):
    """The task behind ``--task=image_classifier``; see `genai_jax.training.phase.Task`."""

    components: ClassVar = {
        "data": ImageDataConfig,
        "classifier": ClassifierConfig,
        "augment": AugmentConfig,
    }
    partition_rules: ClassVar = tuple(
        (f"^model/.*{path}$", axes) for path, axes in classifier.PARTITION_RULES
    )
    loss_unit = "nats per image"
    sample_request = SampleRequest
    evaluate_request = EvaluateRequest

    def __init__(self, config: Config):
        super().__init__(config)
        if not self.loader.label_sizes:
            raise ConfigError(f"--data.dataset={config.data.dataset} has no labels to learn")
        self.model = Classifier(config.classifier, self.loader.label_sizes, self.dtype)

    def init(self, rng: jax.Array) -> tuple[dict, dict]:
        x = jnp.zeros((1, *self.loader.shape))
        return {"model": self.model.init(rng, x)["params"]}, {}

    def phases(self, params: Any) -> tuple[Phase, ...]:
        axes = logical_axes(params, self.partition_rules)
        optimizer = make_optimizer(self.config.optimizer, self.config.train.steps, axes)
        return (Phase("classify", ("model",), self._loss, optimizer),)

    def _loss(self, params, mutables, batch, rng):
        augment_rng, dropout = jax.random.split(rng)
        x = self._augmented(self.scaled(batch["image"]), augment_rng)
        losses, right = self._scores(params, x, batch["labels"], {"dropout": dropout})
        return jnp.mean(losses), ({"accuracy": jnp.mean(jnp.all(right, 1))}, mutables)

    def _scores(self, params, x, labels, rngs=None):
        """Cross-entropy of all attributes [batch]; which are right [batch, attributes]."""
        _, logits = self.model.apply({"params": params["model"]}, x, rngs=rngs)
        smoothing = self.config.augment.label_smoothing if rngs else 0.0
        losses, right = 0.0, []
        for i, values in enumerate(logits):
            wanted = jax.nn.one_hot(labels[:, i], values.shape[-1])
            wanted = optax.smooth_labels(wanted, smoothing)
            losses = losses + optax.softmax_cross_entropy(values, wanted)
            right.append(jnp.argmax(values, -1) == labels[:, i])
        return losses, jnp.stack(right, 1)

    def _augmented(self, x, rng):
        augment = self.config.augment
        shift_rng, noise_rng = jax.random.split(rng)
        if augment.shift:
            x = shifted(x, shift_rng, augment.shift)
        if augment.noise:
            x = x + augment.noise * jax.random.normal(noise_rng, x.shape)
        return x

    @functools.cached_property
    def _evaluation_step(self):
        @jax.jit
        def evaluation_step(params, batch):
            x = self.scaled(batch["image"])
            losses, right = self._scores(params, x, batch["labels"])
            mask = batch["loss_mask"]
            whole = jnp.all(right, 1)
            sums = [mask, losses * mask, whole * mask, *(right * mask[:, None]).T]
            return jnp.stack([jnp.sum(s) for s in sums])

        return evaluation_step

    def evaluate(self, params, mutables, batches, seed: int | None = None) -> dict:
        """Loss in nats an image; accuracy, an example counting as right if all attributes are."""
        del mutables, seed  # nothing is random
        sums = jax.device_get([self._evaluation_step(params, batch) for batch in batches])
        count, loss, whole, *each = np.sum(np.asarray(sums, np.float64), 0)
        scores = {"loss": loss / count, "accuracy": whole / count, "images": int(count)}
        if len(each) > 1:
            scores |= {f"accuracy_{i}": right / count for i, right in enumerate(each)}
        return scores

    def score(self, params, mutables, batches, request) -> dict:
        return self.evaluate(params, mutables, batches(request.batches))

    def sample(self, params, mutables, request):
        raise ConfigError("a classifier draws nothing; evaluate scores it")

    def flops_per_step(self) -> dict:
        x = jax.ShapeDtypeStruct((self.config.data.batch_size, *self.loader.shape), jnp.float32)
        params = jax.eval_shape(self.init, jax.random.key(0))[0]["model"]
        forward = lambda params, x: self.model.apply({"params": params}, x)
        return {
            "flops_per_step": 3 * count_flops(forward, params, x),
            "convention": "3 x forward matmuls and convolutions",
        }


def shifted(x: jax.Array, rng: jax.Array, most: int) -> jax.Array:
    """Each example [batch, *space, channels] moved at random; edges repeat."""
    space = x.shape[1:-1]
    padded = jnp.pad(x, ((0, 0), *((most, most),) * len(space), (0, 0)), mode="edge")
    starts = jax.random.randint(rng, (x.shape[0], len(space)), 0, 2 * most + 1)

    def cut(example, start):
        return jax.lax.dynamic_slice(example, (*start, 0), x.shape[1:])

    return jax.vmap(cut)(padded, starts)


Describe = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def load_classifier(workdir: str, loader: Any) -> Describe:
    """Reads a classifier that fits the images of `loader`.

    Returns:
      uint8 images [n, *space, channels] -> features [n, dim], labels it sees [n, attributes].

    Raises:
      ConfigError: no such run, or one on images of another shape or with other labels.
    """
    config = read_fitting(workdir, "--classifier", "image_classifier", loader)
    task = ImageClassifier(config)
    if task.loader.label_sizes != loader.label_sizes:
        raise ConfigError(
            f"--classifier={workdir} knows labels of sizes {task.loader.label_sizes}; "
            f"--data.dataset={loader.config.dataset} has {loader.label_sizes}"
        )
    params = restore_model(task, config).params

    @jax.jit
    def describe(images):
        features, logits = task.model.apply({"params": params["model"]}, task.scaled(images))
        return features, jnp.stack([jnp.argmax(x, -1) for x in logits], 1)

    def in_batches(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        size = min(len(images), 256)
        parts = []
        for begin in range(0, len(images), size):
            part = images[begin : begin + size]
            padded = np.concatenate([part, np.repeat(part[:1], size - len(part), 0)])
            parts.append([np.asarray(x)[: len(part)] for x in describe(padded)])
        features, labels = zip(*parts, strict=True)
        return np.concatenate(features), np.concatenate(labels)

    return in_batches
