"""What a family gives to the shared training step: phases, and a task that makes them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import optax

PyTree = Any
Batch = Mapping[str, jax.Array]
Params = Mapping[str, PyTree]  # top-level group -> parameters
LossFn = Callable[[Params, PyTree, Batch, jax.Array], tuple[jax.Array, tuple[dict, PyTree]]]


class Phase(NamedTuple):
    """One kind of update within a step.

    The loss maps (params, mutables, batch, rng) to (loss, (metrics, mutables)). A metric named
    "weight" says how much the batch counts when microbatches are averaged (its number of targets).
    A metric named "alive" that is 0 says that the phase can teach nothing any more; like a number
    that is not finite in "loss", "grad_norm" or a "..._penalty" it ends the run.
    """

    name: str  # metric prefix, RNG fold-in, optimizer slot
    trains: tuple[str, ...]  # parameter groups that it updates; all others are constants to it
    loss: LossFn
    optimizer: optax.GradientTransformation
    every: int = 1  # run once in so many steps (lazy regularization)
    repeats: int = 1  # updates in one step, each on its own slice of the batch (critic steps)
    optimizer_of: str = ""  # phase whose optimizer it uses, state and all, instead of its own

    @property
    def slot(self) -> str:
        """Of its optimizer's state."""
        return self.optimizer_of or self.name


class Task(Protocol):
    """A family: its networks, losses, data, and how to draw from it and score it.

    Attributes:
      components: flag component -> dataclass, for the flags that only this task uses.
      partition_rules: (parameter path pattern, logical axes), in order.
      batch_axes: batch entry -> logical axes.
      activation_axes: mesh axes that split neither parameters nor batches, but activations.
      loss_unit: of the losses, for the axis of the plot.
      curves: further plots, name -> (how the names of their metrics end, label of the axis).
      sample_request: the flags of the sample command, a `SampleRequest`.
      evaluate_request: the flags of the evaluate command, an `EvaluateRequest`.
    """

    components: ClassVar[Mapping[str, type]]
    partition_rules: ClassVar[tuple]
    batch_axes: ClassVar[Mapping[str, tuple]]
    activation_axes: ClassVar[tuple[str, ...]]
    loss_unit: ClassVar[str]
    curves: ClassVar[Mapping[str, tuple[tuple[str, ...], str]]]
    sample_request: ClassVar[type]
    evaluate_request: ClassVar[type]

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of every entry of the global batch."""

    def init(self, rng: jax.Array) -> tuple[Params, PyTree]:
        """Fresh parameters and mutables."""

    def pretrained(self) -> dict[str, Params]:
        """Groups, or parts of them, that begin as trained elsewhere: host arrays, as of `init`."""

    def phases(self, params: Params) -> tuple[Phase, ...]:
        """The phases of a step; `params` may be shapes."""

    def train_batches(self, rows: Sequence[int] | None = None) -> Any:
        """An endless checkpointable iterator: `next`, `get_state`, `set_state`, `close`.

        Its batches are these rows of the global ones (all if None), always the same ones whoever
        asks for them. Its state is a dictionary; an entry that is itself a dictionary says
        something of single rows, and those of several processes are joined to one.
        """

    def evaluation_batches(
        self, max_batches: int, rows: Sequence[int] | None = None
    ) -> Iterator[Batch]:
        """Held-out batches, always the same ones in the same order; as many for any `rows`."""

    def evaluate(
        self, params: Params, mutables: PyTree, batches: Iterator[Batch], seed: int | None = None
    ) -> dict:
        """Scores: metric name -> number; "loss" among them, the lower the better.

        What is random in them depends on `seed` alone; the run's own if None.
        """

    def score(
        self, params: Params, mutables: PyTree, batches: Callable[[int], Iterator], request: Any
    ) -> dict:
        """What the evaluate command prints; `batches(count)` gives held-out batches, -1 for all."""

    def sample(self, params: Params, mutables: PyTree, request: Any) -> Any:
        """Draws what `request` (the flags of the sample command) asks for: a `Drawn`."""

    def data_record(self) -> dict:
        """Names, sizes and fingerprints of the data, for run.json."""

    def tokens_per_step(self) -> int | None:
        """Tokens of one global batch, None where there are none."""

    def check_data(self, trained_on: dict):
        """Raises `ConfigError` if a model whose `data_record` this was cannot be used here."""

    def flops_per_step(self) -> dict:
        """Model FLOPs of one step and the convention they were counted by."""
