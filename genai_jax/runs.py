"""The front door for notebooks and scripts: `genai_jax.load` and `genai_jax.train`.

The commands are these functions with a command line in front: `sample` and `evaluate` ask a `Run`,
`train` calls `run_training`.
"""

import contextlib
import functools
import math
import os
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from genai_jax.components import (
    PLACES,
    make_task,
    parse_request,
    request_class,
    set_in,
    tells_how_to_move,
)
from genai_jax.config import Config, ConfigError, flag_name, parse
from genai_jax.errors import NothingHeldOut
from genai_jax.files import writing_to
from genai_jax.inspection import Inspection
from genai_jax.keyword_flags import as_flags, prompts_in_a_file, run_flags
from genai_jax.other_data import other_data, refuse_own_data
from genai_jax.requests import RunRequest, origin_of
from genai_jax.sampled import Sampled, check_suffix, prepare_output, with_origin
from genai_jax.tasks.protocol import Batch, Params, PyTree, Reports, held_out_spec
from genai_jax.tasks.registry import task_class
from genai_jax.trainer import train_here
from genai_jax.training.batches import BatchPlacement
from genai_jax.training.distributed import is_main
from genai_jax.training.evaluation import Evaluator
from genai_jax.training.quiet import without_orbax_messages
from genai_jax.training.restore import Restored, restore_model
from genai_jax.training.sharding import batch_shardings, mesh_context

CHOOSES_MODEL = ("workdir", "task", "code", "checkpoint_step", "ema", "member")


class Run(Inspection):
    """A trained run, with its model on this machine's devices.

    `genai_jax.load` opens one. Keyword arguments are named like the flags of the commands `sample`
    and `evaluate`, with the same defaults and limits; `python -m genai_jax.sample --workdir=D
    --help` lists them. A value that is not allowed raises `ConfigError`, a `ValueError`.

    Attributes:
      config: of the run: `run.config.train.steps`.
      task: what the run learns, a `genai_jax.tasks.protocol.Task`: its networks, losses, and data.
    """

    def __init__(self, config: Config, request: RunRequest, moved: Mapping[str, Any] | None = None):
        self.config, self._chosen, self._step = config, request, request.step()
        self._moved = moved or {}
        with tells_how_to_move(config):
            self.task = make_task(config)
            if "data.validation_percent" in self._moved:
                refuse_own_data(config)

    def __repr__(self) -> str:
        average = f", ema {self.ema}" if self.ema else ""
        return f"<Run {self.workdir}: {self.config.run.task}, step {self.step}{average}>"

    # What it is.

    @functools.cached_property
    def model(self) -> Restored:
        """The restored model; reading it restores it."""
        with tells_how_to_move(self.config), without_orbax_messages():
            return restore_model(
                self.task, self.config, step=self._step, ema=self._chosen.ema,
                member=self._chosen.member,
            )  # fmt: skip

    @property
    def workdir(self) -> pathlib.Path:
        """Folder of the run."""
        return pathlib.Path(self.config.run.workdir)

    @property
    def step(self) -> int:
        """Step of the checkpoint."""
        return self.model.step

    @property
    def ema(self) -> str | None:
        """The average of the parameters in use; None for the parameters themselves."""
        return self.model.ema

    @property
    def params(self) -> Params:
        """The parameters, or their average, as the run trains them: group -> nested arrays."""
        return self.model.params

    @property
    def mutables(self) -> PyTree:
        """What the losses changed without gradients: codebooks, Markov chains."""
        return self.model.mutables

    @functools.cached_property
    def _materialized(self) -> Params:
        with mesh_context(self.model.mesh):
            return self.task.materialize(self.params)

    # What the commands ask.

    def sample(self, **flags: Any) -> Any:
        """Samples: uint8 levels [num_samples, *space, channels], or a list of texts.

        Levels are the values of the run's data, 0 to 255 for most. With `output`, the samples are
        written to that file as well.

        Args:
          **flags: those of the sample command: `num_samples`, `seed`, `prompt`, `label`, `steps`,
            ... Comma-separated flags may be lists; so may `prompt` of a language model.

        Raises:
          ConfigError: a task that cannot be sampled from, or flags that it does not have.
        """
        return self.sampled(**flags).values

    def sampled(self, **flags: Any) -> Sampled:
        """What `sample` returns, with its labels and prompts.

        The result is a `genai_jax.sampled.Arrays` or `Texts`; its `write` writes a file, and that
        of images has a `picture` to look at.
        """
        with prompts_in_a_file(flags) as flags:
            request = self._request("sample_request", flags)
            check_suffix(request.output, request.suffixes)
            prepare_output(request.output)
            sampled = self.answer(request)
        if request.output:
            self.write(sampled, request.output)
        return sampled

    def answer(self, request: Any) -> Sampled:
        """The samples for a request of the sample command."""
        model = self.model
        quiet = without_orbax_messages()
        with mesh_context(model.mesh), tells_how_to_move(self.config), quiet:
            sampled = self.task.sample(self._materialized, model.mutables, request)
        return with_origin(sampled, origin_of(request, model.step, self._changed))

    def write(self, sampled: Sampled, output: str = "") -> list[str]:
        """Writes what `sampled` returned, by default to the workdir; returns the command's lines.

        Raises:
          ConfigError: something else is to be written, or it cannot be.
        """
        if not hasattr(sampled, "write"):
            raise ConfigError(
                "write takes what run.sampled(...) returns, or give output= to sample"
            )
        folder = self.workdir / "samples"
        if not is_main():
            return []
        with writing_to(f"--output={output}" if output else folder):
            return sampled.write(output, folder)

    def evaluate(self, **flags: Any) -> dict[str, Any]:
        """Scores on the held-out data: the object that the evaluate command prints.

        Args:
          **flags: those of the evaluate command: `batches`, `seed`, `classifier`, ...
        """
        return self.scores(self._request("evaluate_request", flags))

    def scores(self, request: Any) -> dict[str, Any]:
        """The scores for a request of the evaluate command."""
        if not self.task.is_scored:
            raise ConfigError(
                f"--task={self.config.run.task} assigns no probabilities, so it has no scores; use "
                "genai_jax.sample"
            )
        if request.batches == 0:
            raise ConfigError("--batches=0 leaves nothing to evaluate on; -1 takes all batches")
        model, seed = self.model, getattr(request, "seed", 0)
        trained = self.task.scored(model.params, request), model.mutables
        quiet = without_orbax_messages()
        with mesh_context(model.mesh), tells_how_to_move(self.config), self._may_score_all(), quiet:
            if self.task.tokens_per_step():  # compiles, so that only scoring is timed
                self._evaluator(*trained, self._batches(1), seed)
            start = time.perf_counter()
            result = self._evaluator(*trained, self._batches(request.batches), seed)
            seconds = time.perf_counter() - start
            if isinstance(self.task, Reports):
                params = self._materialized
                result |= self.task.report(params, model.mutables, self._batches, request)
        places = self._moved.keys() - self._changed.keys()
        result |= other_data(self.task, self.config) if places and is_main() else {}
        broken = [n for n, x in result.items() if isinstance(x, float) and not math.isfinite(x)]
        if broken:
            raise ConfigError(
                f"not finite in the run in --workdir={self.workdir}: {', '.join(broken)}"
            )
        if "tokens" in result:
            result["tokens_per_second"] = result["tokens"] / seconds
        data = getattr(getattr(self.config, "data", None), "dataset", None)
        named = {} if data is None else {"dataset": data}
        unit = {"loss_unit": self.task.loss_unit} if "loss" in result else {}
        where = {"step": model.step, "ema": model.ema, **named, "split": "validation"}
        asked = self._changed | request.changing_scores()
        return {**where, **unit, **({"flags": asked} if asked else {}), **result}

    # What only Python asks.

    def held_out(self, batches: int = -1) -> Iterator[Batch]:
        """Held-out batches in the order in which `evaluate` reads them, as host arrays."""
        with tells_how_to_move(self.config):
            yield from self.task.data.held_out(batches)

    def loss(
        self, batch: Batch | None = None, *, batches: int = -1, seed: int = 0
    ) -> tuple[float, dict[str, float]]:
        """The held-out loss and all held-out metrics, of one batch or of the held-out data.

        Args:
          batch: arrays as `held_out` yields them, those of `run.task.data.batch_spec`; the
            held-out data if None.
          batches: held-out batches to read, -1 for all.
          seed: of metrics that involve randomness.

        Raises:
          ConfigError: a batch that is not of this kind.
        """
        model, spec = self.model, held_out_spec(self.task.data)
        with mesh_context(model.mesh), tells_how_to_move(self.config):
            if batch is None:
                read = self._batches(batches)
            else:
                arrays = {n: np.asarray(x) for n, x in batch.items()}
                typed = {n: x.astype(spec[n].dtype) for n, x in arrays.items() if n in spec}
                read = [self._placement.to_devices(arrays | typed)]
            metrics = self._evaluator(model.params, model.mutables, read, seed)
        return metrics["loss"], metrics

    # How.

    @contextlib.contextmanager
    def _may_score_all(self) -> Iterator[None]:
        """Says how to score other data from which nothing is held out."""
        try:
            yield
        except NothingHeldOut as error:
            if "data.dataset" not in self._moved:
                raise
            raise ConfigError(f"{error}; --data.validation_percent=100 scores all of it") from None

    @property
    def _changed(self) -> dict[str, Any]:
        """The flags of the run that have another value here, besides where the data are."""
        places = {f"data.{name}" for name in PLACES}
        return {name: x for name, x in self._moved.items() if name not in places}

    @functools.cached_property
    def _evaluator(self) -> Evaluator:
        return Evaluator(self.task)

    @functools.cached_property
    def _placement(self) -> BatchPlacement:
        spec = held_out_spec(self.task.data)
        return BatchPlacement(spec, batch_shardings(spec, self.model.mesh))

    def _batches(self, count: int) -> Iterator:
        placement = self._placement
        return map(placement.to_devices, self.task.data.held_out(count, placement.rows))

    def _request(self, kind: str, flags: Mapping[str, Any]) -> Any:
        for name in flags:
            if name in CHOOSES_MODEL:
                raise ConfigError(f"{name} chooses the model: give it to genai_jax.load")
        chosen = {name: getattr(self._chosen, name) for name in CHOOSES_MODEL}
        cls = request_class(task_class(self.config.run.task), kind)
        user = f"a run of --task={self.config.run.task}"
        return parse(as_flags({**chosen, **flags}), {"run": cls}, user=user)[0].run


def moved(flags: Config) -> dict[str, Any]:
    """The flags that a request sets instead of the run's own: name -> value."""
    return {
        flag_name(component, name): value
        for component in flags.components
        if component not in ("run", "distributed")
        for name, value in set_in(flags, component).items()
    }


def load(
    workdir: str | os.PathLike,
    step: int | str | None = None,
    ema: str | None = None,
    *,
    member: int = 0,
    task: str | None = None,
    code: str | Sequence[str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Run:
    """Opens a trained run and restores its model onto this machine's devices.

    Args:
      workdir: folder of the run.
      step: of the checkpoint; "best" for the one with the lowest held-out loss; None for the
        newest.
      ema: average of the parameters: one that the run kept, "width:W", or "none" for the parameters
        themselves; None for the run's ``--ema.use``.
      member: index of the run within a population.
      task: task of the run; needed only if its code lives outside genai_jax, which a workdir never
        decides to execute.
      code: the same for its other code, "my_package.my_module:Name" or a list of such names.
      flags: where the run's data is now, if it moved, {"data.dataset": "text:new/place"}; other
        values of what may differ at use: {"transformer.window": 256}.

    Raises:
      ConfigError: there is no such run, checkpoint, or average.
    """
    chosen = {
        "workdir": os.fspath(workdir), "checkpoint_step": step, "ema": ema, "member": member,
        "task": task, "code": code, **(flags or {}),
    }  # fmt: skip
    request, config = parse_request(as_flags(chosen), "evaluate_request")
    run = Run(config, request.run, moved(request))
    run.model  # noqa: B018  restores
    return run


def train(
    flags: Sequence[str] | Mapping[str, Any] | str | os.PathLike | Config,
    workdir: str | os.PathLike,
) -> Run:
    """Trains a run, or resumes the one in `workdir`, and opens it.

    In a notebook, an interrupt saves a checkpoint and returns the run as far as it got; calling
    this again goes on from there. In a script, SIGINT, SIGTERM, and SIGHUP save a checkpoint and
    then do what they would have done.

    Args:
      flags: of the train command: a list of "--name=value", a mapping {"train.steps": 10}, the path
        of a flagfile, or the `config` of another run.
      workdir: folder for the run's files.

    Raises:
      ConfigError: a mistake in the flags or the data, a loss that is not finite, or files that
        cannot be written.
    """
    config = run_flags(flags, os.fspath(workdir))
    with without_orbax_messages():
        train_here(config)
    return load(config.run.workdir)
