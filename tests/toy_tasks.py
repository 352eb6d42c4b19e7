"""Tiny tasks that use one seam of the training loop each: named as tests.toy_tasks:CLASS."""

import dataclasses
import functools
import json
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from genai_jax.config import Config, field
from genai_jax.data.prefetch import BatchIterator
from genai_jax.requests import ArrayRequest, EvaluateRequest, SampleRequest, Texts
from genai_jax.sampled import Arrays
from genai_jax.tasks.protocol import (
    ArraySpec,
    Collected,
    Data,
    LossOutput,
    Mean,
    Phase,
    Task,
    Transfer,
)
from genai_jax.training.distributed import to_host
from genai_jax.training.optimizer import default_optimizer

SLOPE = np.array([1.0, -2.0, 3.0, 0.5], np.float32)  # what is to be learned


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    batch_size: int = field(8, "Examples in a step.", minimum=1)
    base: str = field("", "Workdir of the run that a frozen base comes from.")


class Points(Data):
    """x [batch, 4] and y = SLOPE . x; batch i of a split is always the same."""

    def __init__(self, config: ToyConfig):
        rows = config.batch_size
        self.rows = rows
        self.batch_spec = {
            "x": ArraySpec((rows, 4), jnp.float32, ("batch", None)),
            "y": ArraySpec((rows,), jnp.float32, ("batch",)),
        }

    def batch(self, number: int, rows=None) -> dict:
        x = np.random.default_rng(number).normal(size=(self.rows, 4)).astype(np.float32)
        x = x[list(rows)] if rows is not None else x
        return {"x": x, "y": x @ SLOPE}

    def train(self, rows=None):
        return BatchIterator(_Numbers(self, rows), buffer_size=0)

    def held_out(self, max_batches, rows=None):
        for number in range(2 if max_batches < 0 else min(2, max_batches)):
            yield self.batch(10_000 + number, rows)

    def record(self) -> dict:
        return {"dataset": "points"}


class _Numbers:
    def __init__(self, points: Points, rows):
        self.points, self.rows, self.number = points, rows, 0

    def next_batch(self):
        self.number += 1
        return self.points.batch(self.number, self.rows)

    def get_state(self):
        return {"number": self.number}

    def set_state(self, state):
        self.number = state["number"]


class Linear(Task):
    """y = kernel . x + bias, in a group "model" with a layer in it."""

    components: ClassVar = {"toy": ToyConfig}
    partition_rules: ClassVar = (("kernel$", ("embed",)), ("bias$", (None,)))

    def __init__(self, config: Config):
        self.config, self.data = config, Points(config.toy)

    def init(self, key):
        layer = {"kernel": 0.1 * jax.random.normal(key, (4,)), "bias": jnp.zeros(1)}
        return {"model": {"layer": layer}}, {}

    def phases(self, params):
        optimizer = default_optimizer(self.config, self.partition_rules)
        return (Phase("fit", ("model",), self.loss, optimizer),)

    def errors(self, params, batch):
        layer = params["model"]["layer"]
        return batch["x"] @ layer["kernel"] + layer["bias"][0] - batch["y"]

    def loss(self, params, mutables, batch, info):
        return LossOutput(jnp.mean(jnp.square(self.errors(params, batch))), {}, mutables)

    def example_metrics(self, params, mutables, batch, key):
        errors = jnp.square(self.errors(params, batch))
        return {"loss": Mean(errors, jnp.ones_like(errors))}


class Adapted(Linear):
    """A frozen base from another run, and an adapter that is added to its kernel."""

    partition_rules: ClassVar = (*Linear.partition_rules, ("^adapter/", (None,)))

    def init(self, key):
        params, mutables = super().init(key)
        return {**params, "adapter": {"delta": jnp.zeros(4)}}, mutables

    def init_from(self):
        if not self.config.toy.base:
            return ()
        return (Transfer(self.config.toy.base, "--toy.base", "params/model", "params/model"),)

    def phases(self, params):
        optimizer = default_optimizer(self.config, self.partition_rules)
        return (Phase("adapt", ("adapter",), self.loss, optimizer),)

    def materialize(self, params):
        layer = params["model"]["layer"]
        merged = {**layer, "kernel": layer["kernel"] + params["adapter"]["delta"]}
        return {**params, "model": {"layer": merged}}

    sample_request = SampleRequest
    evaluate_request = EvaluateRequest

    def sample(self, params, mutables, request):
        return Texts([json.dumps(params["model"]["layer"]["kernel"].tolist())])

    def report(self, params, mutables, batches, request):
        return {"first": float(params["model"]["layer"]["kernel"][0])}


class Collecting(Linear):
    """Guesses from the model and their rewards, which Python computes, make the batch."""

    collected_spec: ClassVar = {
        "x": ArraySpec((8, 4), jnp.float32, ("batch", None)),
        "reward": ArraySpec((8,), jnp.float32, ("batch",)),
    }

    def collect(self, params, mutables, batch, key):
        x = jax.device_get(batch["x"])
        errors = jax.device_get(self.errors(params, batch))
        reward = np.array([-abs(float(e)) for e in errors], np.float32)
        return Collected({"x": x, "reward": reward}, {"reward": float(reward.mean())})

    def loss(self, params, mutables, batch, info):
        kernel = params["model"]["layer"]["kernel"]
        away = jnp.mean(jnp.sum(jnp.square(kernel - SLOPE)) - batch["reward"])
        return LossOutput(away, {"seen": jnp.mean(batch["reward"])}, mutables)


class Averages(Task):
    """Fitted without gradients: the mean of y."""

    components: ClassVar = {"toy": ToyConfig}
    partition_rules: ClassVar = (("^mean$", ()),)

    def __init__(self, config: Config):
        self.data = Points(config.toy)

    def init(self, key):
        return {"mean": jnp.zeros(())}, {}

    def phases(self, params):
        return ()

    def fit(self, batches):
        return {"mean": np.float32(np.mean([batch["y"].mean() for batch in batches]))}

    def example_metrics(self, params, mutables, batch, key):
        errors = jnp.square(batch["y"] - params["mean"])
        return {"loss": Mean(errors, jnp.ones_like(errors))}


@dataclasses.dataclass(frozen=True)
class PictureRequest(ArrayRequest):
    num_samples: int = field(4, "Pictures.", minimum=1)


class Drawing(Linear):
    """Samples are pictures of one row of four pixels, the kernel plus noise."""

    sample_request = PictureRequest
    compiled = 0  # how often a program was traced

    @functools.cached_property
    def _program(self):
        @functools.partial(jax.jit, static_argnums=2)
        def pictures(params, key, count):
            type(self).compiled += 1
            x = params["model"]["layer"]["kernel"] * 20 + jax.random.normal(key, (count, 1, 4))
            levels = jnp.round(jnp.clip(x + 100, 0, 255)).astype(jnp.int16)
            return jnp.where(jnp.isfinite(x), levels, -1)[..., None]

        return jax.jit(pictures, static_argnums=2)

    def sample(self, params, mutables, request):
        key = jax.random.key(request.seed)
        levels = to_host(self._program(params, key, request.num_samples))
        return Arrays("drawing", levels, 256)
