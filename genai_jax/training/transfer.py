"""Parameters that begin as another run trained them, read straight into this run's shardings."""

import os
import pathlib
import sys
from collections.abc import Mapping

import jax

from genai_jax.config import (
    Config,
    ConfigError,
    last_value,
    parse,
)
from genai_jax.flagfiles import expand_flagfiles
from genai_jax.requests import BEST
from genai_jax.tasks.protocol import Prepares, PyTree, Task, Transfer
from genai_jax.training.checkpoint import Checkpointer, Misfit, first_line
from genai_jax.training.ema import EmaConfig
from genai_jax.training.step import TrainState
from genai_jax.training.trees import merged, nested, overlay, path_name
from genai_jax.training.workdir import flags_path, read_record

FLAG = "--init_from"


def initial_parts(task: Task, config: Config, shapes: TrainState, state: TrainState) -> PyTree:
    """What of a fresh state does not begin as `task.init` made it.

    Args:
      task: of this run.
      config: of this run, for --init_from and --init_map.
      shapes: of its state, `jax.ShapeDtypeStruct`s with the shardings to read into.
      state: as `task.init` made it; only `Prepares.prepare` looks at it.

    Returns:
      Parts of {"params": ..., "mutables": ...}.

    Raises:
      ConfigError: another run that is not there or does not fit; the parameter is named.
    """
    ours = {"params": shapes.params, "mutables": shapes.mutables}
    part: PyTree = {}
    for transfer in (*task.init_from(), *_by_flag(task, config, ours)):
        part = merged(part, load(transfer, ours))
    if isinstance(task, Prepares):
        params = overlay(state.params, part.get("params", {}))
        part = merged(part, {"params": task.prepare(params)})
    return part


def load(transfer: Transfer, shapes: PyTree) -> PyTree:
    """What a transfer puts in place, as a part of {"params": ..., "mutables": ...}.

    Raises:
      ConfigError: as `initial_parts`.
    """
    source = SavedState(transfer.workdir, transfer.flag, transfer.step)
    target = _at(shapes, transfer.target)
    if target is None:
        raise ConfigError(
            f"{transfer.flag}={transfer.workdir}: there is nothing named "
            f"{_short(transfer.target)} in this run to initialize, only "
            f"{', '.join(map(_short, _groups(shapes)))}"
        )
    wanted: dict[str, tuple[str, jax.ShapeDtypeStruct]] = {}
    for path, shape in jax.tree_util.tree_flatten_with_path(target)[0]:
        rest = path_name(path)
        name = source.resolve(f"{transfer.source}/{rest}".strip("/"), transfer.average)
        if name is None and transfer.partial:
            continue
        _check_fits(source, transfer, name, rest, shape)
        wanted[rest] = (name, shape)
    arrays = source.read({name: shape for name, shape in wanted.values()})
    if transfer.partial:
        part = nested({rest: arrays[name] for rest, (name, _) in wanted.items()})
    else:
        array = lambda path, _: arrays[wanted[path_name(path)][0]]
        part = jax.tree_util.tree_map_with_path(array, target)
    return nested({transfer.target: part})


def _groups(tree: PyTree) -> list[str]:
    """The top-level parameters and mutables, as paths."""
    parts = {kind: x for kind, x in tree.items() if isinstance(x, dict)}
    return [f"{kind}/{name}" for kind, groups in parts.items() for name in groups]


def _check_fits(source: "SavedState", transfer: Transfer, name: str | None, rest: str, shape):
    where = f"{transfer.flag}={transfer.workdir}"
    ours = f"{transfer.target}/{rest}".strip("/")
    if name is None:
        raise ConfigError(
            f"{where} has no {transfer.source}/{rest}, with which {ours} of this run would begin"
        )
    if source.shapes[name] != tuple(shape.shape):
        raise ConfigError(
            f"{where}: {name} has shape {source.shapes[name]} there, and {ours} has "
            f"{tuple(shape.shape)} here"
        )


class SavedState:
    """A checkpoint of a run, read array by array; no code of its task is needed.

    Args:
      workdir: of the run.
      flag: that names it, for error messages.
      step: of the checkpoint, or "best"; None for the newest that is intact.

    Attributes:
      step: of the checkpoint.
      shapes: path of every saved array ("params/model/...", "ema/0.9/model/...") -> its shape.

    Raises:
      ConfigError: no run, or no such checkpoint.
    """

    def __init__(self, workdir: str, flag: str, step: int | str | None = None):
        self._where = f"{flag}={workdir}"
        flags_path(workdir, flag)
        folder = pathlib.Path(workdir) / "checkpoints"
        if not folder.is_dir():
            raise ConfigError(f"no checkpoint in {flag}={workdir}: the run has not saved one yet")
        self._checkpointer = Checkpointer(folder, read_only=True)
        if last_value(_flags_of(workdir, flag), "population.size") not in (None, "1"):
            raise ConfigError(f"{flag}={workdir} is a population: name a single run")
        problem = None
        for candidate in self._candidates(step, folder):
            try:
                self.shapes: Mapping[str, tuple[int, ...]]
                self.shapes = self._checkpointer.saved_shapes(candidate)
                self.step = candidate
                break
            except Misfit:
                raise
            except Exception as error:  # orbax and tensorstore raise many types for damaged files
                self._checkpointer.raise_if_unreadable(candidate, error)
                problem = f"checkpoint {candidate} in {folder} cannot be read: {first_line(error)}"
                print(f"warning: {problem}", file=sys.stderr)
        else:
            nothing = f"no checkpoint in {flag}={workdir}: the run has not saved one yet"
            raise ConfigError(problem or nothing)

    def _candidates(self, step: int | str | None, folder: pathlib.Path) -> list[int]:
        steps = self._checkpointer.steps()
        if step is None:
            return steps[::-1]
        chosen = self._checkpointer.best_step() if step == BEST else step
        if chosen not in steps:
            raise ConfigError(
                f"{self._where}:{step}: {folder} has checkpoints of {steps or 'none'}"
            )
        return [chosen]

    def resolve(self, path: str, average: str | None) -> str | None:
        """The saved array of a path: that of the average if it has it; None if there is none."""
        averaged = path.replace("params/", f"ema/{average}/", 1)
        if average and path.startswith("params/") and averaged in self.shapes:
            return averaged
        return path if path in self.shapes else None

    def read(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Path -> array, with the sharding that is asked for.

        Raises:
          ConfigError: they cannot be read, or are not what was saved.
        """
        try:
            return self._checkpointer.read_arrays(self.step, wanted)
        except ConfigError:
            raise
        except Exception as error:  # orbax and tensorstore raise many types for damaged files
            raise ConfigError(
                f"checkpoint {self.step} of {self._where} cannot be read: {first_line(error)}"
            ) from None


def _by_flag(task: Task, config: Config, shapes: PyTree) -> list[Transfer]:
    """The transfers of --init_from and --init_map."""
    given, mapping = config.run.init_from, config.run.init_map
    if not given:
        if mapping:
            raise ConfigError(f"--init_map={mapping} needs {FLAG}")
        return []
    workdir, step = _with_step(given)
    source = SavedState(workdir, FLAG, step)
    _check_tokenizer(task, workdir)
    if mapping:
        pairs = [part.partition(":")[::2] for part in mapping.split(",")]
        pairs = [(_full(a), _full(b or a)) for a, b in pairs]
    else:
        theirs = {"/".join(path.split("/")[:2]) for path in source.shapes}
        pairs = [(group, group) for group in _groups(shapes) if group in theirs]
        if not any(group.startswith("params/") for group, _ in pairs):
            raise ConfigError(
                f"{FLAG}={workdir} has {', '.join(sorted(g for g in theirs if '/' in g))}; this "
                f"run has {', '.join(_groups(shapes))}: name what to take with "
                "--init_map=SOURCE:TARGET"
            )
    average = _average_in_use(workdir)
    return [Transfer(workdir, FLAG, a, b, average, step) for a, b in pairs]


def _with_step(text: str) -> tuple[str, int | str | None]:
    """The parts of WORKDIR[:STEP]; a folder of that very name is a workdir."""
    workdir, _, step = text.rpartition(":")
    if os.path.lexists(text) or not workdir or not (step == BEST or step.isdecimal()):
        return text, None
    return workdir, step if step == BEST else int(step)


def _short(path: str) -> str:
    """A path as --init_map writes it."""
    return path.removeprefix("params/")


def _full(path: str) -> str:
    """A path of --init_map: of the parameters, unless it says that it is of the mutables."""
    return path if path.startswith("mutables/") else f"params/{path}"


def _check_tokenizer(task: Task, workdir: str):
    """Raises `ConfigError` if the other run's tokenizer gave its tokens other meanings."""
    name = "tokenizer_sha256"
    before = read_record(workdir).get("data", {}).get(name)
    now = task.data.record().get(name)
    if before and now and before != now:
        raise ConfigError(
            f"{FLAG}={workdir} was trained with another tokenizer: its sha256 is {before[:12]}, "
            f"that of this run {now[:12]}"
        )


def _flags_of(workdir: str, flag: str) -> list[str]:
    """The flags of a run, as text."""
    return expand_flagfiles([f"--flagfile={flags_path(workdir, flag)}"])


def _average_in_use(workdir: str) -> str | None:
    """The average that --ema.use of a run names; its other flags are not looked at."""
    ema = [argument for argument in _flags_of(workdir, FLAG) if argument.startswith("--ema.")]
    return parse(ema, {"ema": EmaConfig})[0].ema.use or None


def _at(tree: PyTree, path: str) -> PyTree | None:
    for name in path.split("/"):
        if not (isinstance(tree, dict) and name in tree):
            return None
        tree = tree[name]
    return tree
