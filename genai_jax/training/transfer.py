"""Parameters that begin as another run trained them, read straight into this run's shardings."""

import pathlib
from collections.abc import Mapping

import jax

from genai_jax.config import Config, ConfigError, expand_flagfiles, parse
from genai_jax.tasks.protocol import Params, PyTree, Task, Transfer
from genai_jax.training.checkpoint import Checkpointer
from genai_jax.training.ema import EmaConfig
from genai_jax.training.trees import merged, nested, overlay, path_name
from genai_jax.training.workdir import flags_path, read_record

FLAG = "--init_from"


def initial_parts(task: Task, config: Config, shapes: Params, params: Params) -> Params:
    """The part of the parameters that does not begin as `task.init` made it.

    Args:
      task: of this run.
      config: of this run, for --init_from and --init_map.
      shapes: of its parameters, `jax.ShapeDtypeStruct`s with the shardings to read into.
      params: as `task.init` made them; only `Prepares.prepare` looks at them.

    Raises:
      ConfigError: another run that is not there or does not fit; the parameter is named.
    """
    part: Params = {}
    for transfer in (*task.init_from(), *_by_flag(task, config, shapes)):
        part = merged(part, load(transfer, shapes))
    if hasattr(task, "prepare"):
        part = merged(part, task.prepare(overlay(params, part)))
    return part


def load(transfer: Transfer, shapes: Params) -> Params:
    """What a transfer puts in place, as a part of the parameters.

    Raises:
      ConfigError: as `initial_parts`.
    """
    source = SavedState(transfer.workdir, transfer.flag)
    target = _at(shapes, transfer.target)
    if target is None:
        raise ConfigError(
            f"{transfer.flag}={transfer.workdir}: this run has no {transfer.target}; its groups "
            f"are {', '.join(sorted(shapes))}"
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
    """The newest checkpoint of a run, read array by array; no code of its task is needed.

    Attributes:
      step: of the checkpoint.
      shapes: path of every saved array ("params/model/...", "ema/0.9/model/...") -> its shape.

    Raises:
      ConfigError: no run, or no checkpoint.
    """

    def __init__(self, workdir: str, flag: str):
        flags_path(workdir, flag)
        folder = pathlib.Path(workdir) / "checkpoints"
        if not folder.is_dir():
            raise ConfigError(f"no checkpoint in {flag}={workdir}: the run has not saved one yet")
        self._checkpointer = Checkpointer(folder, read_only=True)
        steps = self._checkpointer.steps()
        if not steps:
            raise ConfigError(f"no checkpoint in {flag}={workdir}: the run has not saved one yet")
        self.step = steps[-1]
        self.shapes: Mapping[str, tuple[int, ...]] = self._checkpointer.saved_shapes(self.step)

    def resolve(self, path: str, average: str | None) -> str | None:
        """The saved array of a path: that of the average if it has it; None if there is none."""
        averaged = path.replace("params/", f"ema/{average}/", 1)
        if average and path.startswith("params/") and averaged in self.shapes:
            return averaged
        return path if path in self.shapes else None

    def read(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Path -> array, with the sharding that is asked for."""
        return self._checkpointer.read_arrays(self.step, wanted)


def _by_flag(task: Task, config: Config, shapes: Params) -> list[Transfer]:
    """The transfers of --init_from and --init_map."""
    workdir, mapping = config.run.init_from, config.run.init_map
    if not workdir:
        if mapping:
            raise ConfigError(f"--init_map={mapping} needs {FLAG}")
        return []
    source = SavedState(workdir, FLAG)
    try:
        task.data.check(read_record(workdir).get("data", {}))
    except ConfigError as error:
        raise ConfigError(f"{FLAG}={workdir}: {error}") from None
    if mapping:
        pairs = [part.partition(":")[::2] for part in mapping.split(",")]
        pairs = [(a, b or a) for a, b in pairs]
    else:
        theirs = {path.split("/")[1] for path in source.shapes if path.startswith("params/")}
        pairs = [(group, group) for group in shapes if group in theirs]
        if not pairs:
            raise ConfigError(
                f"{FLAG}={workdir} has the groups {', '.join(sorted(theirs))} and this run has "
                f"{', '.join(sorted(shapes))}: name what to take with --init_map=SOURCE:TARGET"
            )
    average = _average_in_use(workdir)
    return [Transfer(workdir, FLAG, f"params/{a}", b, average) for a, b in pairs]


def _average_in_use(workdir: str) -> str | None:
    """The average that --ema.use of a run names; its other flags are not looked at."""
    argv = expand_flagfiles([f"--flagfile={flags_path(workdir, FLAG)}"])
    ema = [argument for argument in argv if argument.startswith("--ema.")]
    return parse(ema, {"ema": EmaConfig})[0].ema.use or None


def _at(tree: PyTree, path: str) -> PyTree | None:
    for name in path.split("/"):
        if not (isinstance(tree, dict) and name in tree):
            return None
        tree = tree[name]
    return tree
