"""The contract between a family and everything that trains, samples, and scores it.

A family subclasses `Task`. What only some families
can do is a protocol of its own: `Samples`, `Reports`, `Collects`, `Fitted`, `Prepares`,
`CountsFlops`.
"""

import pathlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import optax

PyTree = Any
Batch = Mapping[str, jax.Array]
Params = Mapping[str, PyTree]  # top-level group -> parameters


class StepInfo(NamedTuple):
    """What a loss may know about the step in which it is computed."""

    rng: jax.Array  # a separate key for every phase, microbatch, and repeat
    step: jax.Array  # steps completed before this one; accumulation does not change it


class LossOutput(NamedTuple):
    """The result of a loss."""

    loss: jax.Array  # scalar, float32
    metrics: dict[str, jax.Array]  # scalars to log
    mutables: PyTree  # the state of the networks after the loss (codebooks, chains, ...)
    weight: jax.Array | float = 1.0  # how much this microbatch counts, e.g. its number of targets
    can_learn: jax.Array | bool = True  # False ends the run: nothing is left to learn from


LossFn = Callable[[Params, PyTree, Batch, StepInfo], LossOutput]


class Phase(NamedTuple):
    """One kind of update within a step."""

    name: str  # prefix of its metrics, seed of its randomness, key of its optimizer state
    trains: tuple[
        str, ...
    ]  # paths of the parameters it updates; all others are constants: `trained_paths`
    loss: LossFn
    optimizer: optax.GradientTransformation
    every: int = 1  # steps between updates (lazy regularization)
    repeats: int = 1  # updates per step, each on its own slice of the batch (critic updates)
    epochs: int = 1  # passes over the batch per step, each of `repeats` updates (PPO)
    stuck: str = "nothing is left to learn from"  # what is said when `can_learn` is False
    optimizer_of: str = ""  # phase whose optimizer and optimizer state it shares

    @property
    def slot(self) -> str:
        """Key of its optimizer's state."""
        return self.optimizer_of or self.name


class Mean(NamedTuple):
    """A metric as a weighted mean over examples: sum of `total` / sum of `weight`.

    Both are [batch] arrays, 0 where an example is padding. `total` may have more axes, which are
    kept (counts of codes).
    """

    total: jax.Array
    weight: jax.Array


class Rows(NamedTuple):
    """Arrays of single examples, collected on the host for a metric that is not a mean."""

    values: jax.Array  # [batch, ...]
    mask: jax.Array  # [batch], 0 where an example is padding
    limit: int = 1024  # examples to collect at most


class ArraySpec(NamedTuple):
    """One entry of the global batch."""

    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[str | None, ...]  # logical axes, as the sharding table names them


def batch_rows(spec: Mapping[str, ArraySpec]) -> int:
    """Rows of the global batch."""
    return next(iter(spec.values())).shape[0]


class Transfer(NamedTuple):
    """Parameters (or mutables) that are initialized from another run.

    They are read straight into this run's shardings, so no device ever holds a whole copy.
    """

    workdir: str  # of the other run
    flag: str  # the flag that names it, for error messages
    source: str  # path in its state, e.g. "params/model" or "mutables/codebooks"
    target: str  # path in this run's state, e.g. "params/teacher"
    average: str | None = None  # average of the other run to use; None: its parameters
    step: int | str | None = None  # of its checkpoint, or "best"; None: the newest
    partial: bool = False  # whether the target may have arrays that the source lacks


class Data(Protocol):
    """What a run is trained on."""

    batch_spec: Mapping[str, ArraySpec]  # of the global batch

    @abstractmethod
    def train(self, rows: Sequence[int] | None = None) -> Any:
        """An endless checkpointable iterator: `next`, `get_state`, `set_state`, `close`.

        Its batches are these rows of the global batches (all if None), the same in any process.
        Its state is a dictionary; an entry that is itself a dictionary describes single rows, and
        those of several processes are merged.
        """

    @abstractmethod
    def held_out(self, max_batches: int, rows: Sequence[int] | None = None) -> Iterator[Batch]:
        """Held-out batches, the same in the same order every time; as many for any `rows`."""

    @abstractmethod
    def record(self) -> dict:
        """Names, sizes, and fingerprints of the data, for run.json."""

    def check(self, trained_on: dict) -> None:
        """Raises `ConfigError` if a model trained on data with this record cannot be used here."""


def held_out_spec(data: Data) -> Mapping[str, ArraySpec]:
    """The entries of held-out batches: those of training, unless the data has a `held_out_spec`."""
    return getattr(data, "held_out_spec", None) or data.batch_spec


@runtime_checkable
class Keeps(Protocol):
    """Data of which a run keeps, in its workdir, what sampling and scoring need."""

    def keep(self, folder: pathlib.Path, record: dict):
        """Writes it, unless it is there; `record` is that of `Data`. Called by one process.

        Data that are read for sampling and scoring find it at ``config.kept["data.dataset"]``, and
        a tokenizer, which is called ``tokenizer.*``, at ``config.kept["data.tokenizer"]``, and
        ``vocabulary.tsv`` at ``config.kept["data.vocabulary"]``.
        """


class Task(Protocol):
    """A family: its networks, losses, and data.

    Attributes:
      components: flag component -> dataclass, for the flags that only this task uses.
      partition_rules: ordered (parameter path pattern, logical axes); every parameter needs one.
      mutable_rules: the same for mutables; those that match no rule are replicated.
      data: what it is trained on.
      activation_axes: mesh axes that split activations only, neither parameters nor batches.
      evaluation_seed: seed of what is random in the held-out metrics during training; that of the
        run if None.
      loss_unit: unit of the losses, for the axis of the plot.
      curves: additional plots: name -> (suffixes of metric names, axis label).
      is_scored: whether it has held-out metrics.
    """

    components: ClassVar[Mapping[str, type]]
    partition_rules: Sequence[tuple[str, tuple]]
    data: Data
    mutable_rules: Sequence[tuple[str, tuple]] = ()
    activation_axes: tuple[str, ...] = ()
    loss_unit: str = "loss"
    evaluation_seed: int | None = None
    curves: Mapping[str, tuple[tuple[str, ...], str]] = {}
    is_scored: bool = True

    @abstractmethod
    def init(self, key: jax.Array) -> tuple[Params, PyTree]:
        """Initial parameters and mutables; traced, so that they are created sharded."""

    @abstractmethod
    def phases(self, params: Params) -> tuple[Phase, ...]:
        """The phases of a step, in order; `params` may be shapes."""

    @abstractmethod
    def example_metrics(
        self, params: Params, mutables: PyTree, batch: Batch, key: jax.Array
    ) -> dict[str, "Mean | Rows"]:
        """Metrics of the examples of a held-out batch; traced. "loss" is among them.

        Args:
          params: as the run trains them, with adapters merged in (`materialize`).
          mutables: of the run.
          batch: of `data.held_out`.
          key: for randomness in metrics; depends on the seed and the index of the batch.
        """

    def summarize(
        self, reduced: dict[str, Any], params: Params, mutables: PyTree, key: jax.Array
    ) -> dict[str, float]:
        """The numbers to report, from the reduced metrics of all batches; runs on the host.

        Args:
          reduced: name -> `Mean` of float64 sums over all examples, or the [examples, ...] array
            of a `Rows`.
          params, mutables, key: as for `example_metrics`.
        """
        return {name: float(x.total / x.weight) for name, x in reduced.items()}

    def scored(self, params: Params, request: Any) -> Params:
        """The parameters that a request of the evaluate command scores: those of the run."""
        return params

    def changed_length(self, step: int, before: int) -> str | None:
        """What another number of steps than `before` does to the task at `step`; None if nothing.

        The run's learning rate is not meant: training tells of it.
        """
        return None

    def init_from(self) -> tuple[Transfer, ...]:
        """Parameters to initialize from other runs."""
        return ()

    def materialize(self, params: Params) -> Params:
        """Parameters as losses and metrics take them: with adapters merged into what they adapt.

        Gradients pass through it; by default nothing is merged.
        """
        return params

    def tokens_per_step(self) -> int | None:
        """Tokens of a global batch; None for data without tokens."""
        return None


def step_spec(task: Task) -> Mapping[str, ArraySpec]:
    """Specification of the batch that a step takes: from the data, or collected from the model."""
    return getattr(task, "collected_spec", None) or task.data.batch_spec


@runtime_checkable
class Samples(Protocol):
    """A task that the sample command can sample from; `params` have adapters merged in.

    ``--sample.every`` asks for `sample_request()`, or for what a method `request_in_training()`
    returns if the task has one. Programs are kept with the task (`kept`), so that the samples of
    the next step compile nothing.
    """

    sample_request: ClassVar[type]  # flags of the command, a subclass of `requests.SampleRequest`

    def sample(self, params: Params, mutables: PyTree, request: Any) -> Any:
        """What `request` asks for, as a `requests.Sampled`."""


@runtime_checkable
class Reports(Protocol):
    """A task for which the evaluate command prints more than the held-out metrics."""

    evaluate_request: ClassVar[
        type
    ]  # flags of the command, a subclass of `requests.EvaluateRequest`

    def report(
        self, params: Params, mutables: PyTree, batches: Callable[[int], Iterator], request: Any
    ) -> dict:
        """Additional metrics; `batches(count)` yields held-out batches, all of them for -1."""


@runtime_checkable
class Embeds(Protocol):
    """A task whose model computes hidden states, features, or latents of its inputs."""

    def embed(self, params: Params, mutables: PyTree, inputs: Any) -> Any:
        """Inputs, held-out ones for None, to a host array [inputs, ...], float32.

        `params` have adapters merged in and are on one device, as are the mutables.
        """


@runtime_checkable
class Attends(Protocol):
    """A language model whose layers can be looked at."""

    def attention_weights(self, params: Params, mutables: PyTree, text: str) -> Any:
        """The weights of one text, a host array [layers, heads, query, key]; as for `Embeds`."""

    def logit_lens(self, params: Params, text: str) -> Any:
        """Logits after each layer, a host array [layers + 1, length, tokens], as for `Embeds`."""

    def token_texts(self, text: str) -> list[str]:
        """Its tokens: the axes `query` and `key`."""


class Collected(NamedTuple):
    """A batch collected from the model itself, and metrics to log about it."""

    batch: Mapping[str, Any]
    metrics: Mapping[str, float]


@runtime_checkable
class Collects(Protocol):
    """A task whose batches are collected from the model: rollouts and their rewards.

    Attributes:
      collected_spec: entries of the batch that the step takes, instead of `data.batch_spec`.
    """

    collected_spec: Mapping[str, ArraySpec]

    def collect(self, params: Params, mutables: PyTree, batch: Batch, key: jax.Array) -> Collected:
        """The batch for one step. Runs on the host, before the step; rewards may be Python.

        Args:
          params: with adapters merged in, on the devices.
          mutables: of the run.
          batch: of `data.train`, on the devices.
          key: of this step.

        Returns:
          Arrays on the devices, or host arrays that are the same in every process.
        """


@runtime_checkable
class Fitted(Protocol):
    """A task that is fitted in one pass instead of by gradients; its `phases` are ()."""

    def fit(self, batches: Iterable[Mapping[str, Any]]) -> Params:
        """Fits parameters, shaped like those of `init`, to host batches of the training data."""


@runtime_checkable
class CountsFlops(Protocol):
    """A task that knows the FLOPs of a step; otherwise they are counted from its losses."""

    def flops_per_step(self) -> dict:
        """`flops_per_step`, the `convention` they are counted by, and perhaps
        `inactive_parameters`, those that a token does not use."""


@runtime_checkable
class Prepares(Protocol):
    """A task that computes some parameters from its data before the first step."""

    def prepare(self, params: Params) -> Params:
        """Parts of `params` to replace; `params` already holds what `init_from` transferred."""
