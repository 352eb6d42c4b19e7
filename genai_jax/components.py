"""The flags that all runs share, and how a command line becomes the configuration of a task."""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from genai_jax.config import (
    HELP,
    Config,
    ConfigError,
    MissingFile,
    field,
    help_text,
    last_value,
    name_flags,
    parse,
)
from genai_jax.flagfiles import expand_flagfiles
from genai_jax.moved_flags import flag_at_use, moved_flag
from genai_jax.outside import allow, is_allowed, is_outside
from genai_jax.outside_flags import named_code, own_components
from genai_jax.requests import EvaluateRequest, SampleRequest
from genai_jax.tasks.registry import TASKS, task_class, task_name
from genai_jax.training.checkpoint import CheckpointConfig
from genai_jax.training.compiler import CompilerConfig
from genai_jax.training.distributed import DistributedConfig
from genai_jax.training.ema import EmaConfig
from genai_jax.training.optimizer import OptimizerConfig
from genai_jax.training.options import EvalConfig, ProfileConfig, SampleConfig, TrainConfig
from genai_jax.training.population import PopulationConfig
from genai_jax.training.portable import with_kept, without_kept
from genai_jax.training.sharding import MeshConfig
from genai_jax.training.workdir import flags_path, recorded_flags

DTYPES = ("float32", "bfloat16")  # the gradients of float16 would need loss scaling
ATTENTION = ("auto", "xla", "xla_chunked", "tpu", "gpu", "cudnn")
DEFAULT_TASK = "language_model"


@dataclasses.dataclass(frozen=True)
class RunConfig:
    task: str = field(
        DEFAULT_TASK,
        f"What the run learns: one of {', '.join(TASKS)}, or the class of a task of your own, "
        "as my_package.my_module:MyTask.",
    )
    seed: int = field(
        0, "Seed of the parameters, the data order, dropout, and everything random.", minimum=0
    )
    dtype: str = field(
        "float32", "Precision of the matmuls; parameters stay in float32.", choices=DTYPES
    )
    workdir: str = field("", "Folder of the run.", changeable=True, path=True)
    resume_with_changes: bool = field(
        False, "Let a run go on with another learning rate or schedule, or with other data.",
        changeable=True,
    )  # fmt: skip
    attention: str = field("auto", "Attention backend.", choices=ATTENTION, changeable=True)
    code: str | None = field(
        None,
        "Comma-separated names, as my_package.my_module:Name, of the code outside genai_jax that "
        "runs on which this one builds may use.",
        changeable=True,
    )
    init_from: str | None = field(
        None,
        "Workdir of a run whose parameters initialize this one, from its newest checkpoint or, as "
        "WORKDIR:STEP or WORKDIR:best, from another one.",
        path=True,
    )
    init_map: str | None = field(
        None,
        "What to take from --init_from: comma-separated parameter paths, SOURCE or SOURCE:TARGET "
        "(model:teacher). If unset, every group that both runs have.",
    )


# In the order of flags.txt. A task that is fitted in one pass does not use those in GRADIENT.
SHARED = {
    "run": RunConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
    "sample": SampleConfig,
    "checkpoint": CheckpointConfig,
    "optimizer": OptimizerConfig,
    "ema": EmaConfig,
    "mesh": MeshConfig,
    "profile": ProfileConfig,
    "distributed": DistributedConfig,
    "compiler": CompilerConfig,
    "population": PopulationConfig,
}
GRADIENT = ("sample", "optimizer", "ema", "mesh", "profile", "compiler", "population")
# Flags of the data that a request may override, and those of text that `evaluate` may.
MOVABLE = ("dataset", "data_dir", "tokenizer")
OF_OTHER_TEXT = ("text_key", "validation_percent")
PLACES = (*MOVABLE, *OF_OTHER_TEXT)
REQUESTS = {"sample_request": SampleRequest, "evaluate_request": EvaluateRequest}


def components_of(cls: type) -> dict[str, type]:
    """Flag components of a task: name -> dataclass."""
    unused = GRADIENT if hasattr(cls, "fit") else ()
    for name in cls.components:
        if name in SHARED:
            raise ConfigError(
                f"--task={task_name(cls)} has a component {name!r}, a name that every run has: "
                f"choose another than {', '.join(SHARED)}"
            )
    return {n: c for n, c in SHARED.items() if n not in unused} | dict(cls.components)


def parse_run(argv: Sequence[str]) -> Config:
    """The configuration of a run: the shared components and those of its task.

    The command line may name code outside this project, which is imported if it has flags.

    Raises:
      ConfigError: see `genai_jax.config.parse` and `task_class`.
    """
    argv = expand_flagfiles(argv)
    task = last_value(argv, "task") or DEFAULT_TASK
    allow([task, *_code(argv)])
    allow(named_code(argv, components_of(task_class(task))))
    return _parse(argv, task)


def _code(argv: Sequence[str]) -> list[str]:
    """The names in ``--code``.

    Raises:
      ConfigError: one that is not of the form "module:Name".
    """
    text = last_value(argv, "code")
    names = [] if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if not is_outside(name):
            raise ConfigError(
                f"--code={text}: {name!r} is not a name of the form my_package.my_module:Name"
            )
    return names


def _parse(argv: Sequence[str], task: str) -> Config:
    components = components_of(task_class(task))
    components |= own_components(argv, components)
    unused = {name: cls() for name, cls in SHARED.items() if name not in components}
    return parse(argv, components, user=f"--task={task}", defaults=unused)[0]


def make_task(config: Config) -> Any:
    """The task of a configuration.

    Raises:
      ConfigError: flags that contradict each other, or a task without data or partition rules.
    """
    task = task_class(config.run.task)(config)
    missing = [name for name in ("data", "partition_rules") if not hasattr(task, name)]
    if missing:
        raise ConfigError(f"--task={config.run.task} lacks {' and '.join(missing)}")
    return task


def run_help(argv: Sequence[str], usage: str) -> str:
    """Help text of the train command for the task that the command line names."""
    argv = expand_flagfiles([a for a in argv if a not in HELP])
    task = last_value(argv, "task") or DEFAULT_TASK
    notes = (
        f"Flags of --task={task}. Add --task=NAME to see those of another task: {', '.join(TASKS)}."
    )
    allow([task])
    components = components_of(task_class(task))
    allow(named_code(argv, components))
    return help_text(f"{usage or ''}\n\n{notes}", components | own_components(argv, components))


def parse_request(argv: Sequence[str], kind: str) -> tuple[Any, Config]:
    """The flags of a command that works on an existing run, and the configuration of that run.

    Args:
      argv: the command line.
      kind: the attribute of a task that holds the dataclass of flags; a key of REQUESTS.

    Returns:
      The request (components `run` and `distributed`), and the configuration of the run.

    Raises:
      ConfigError: there is no run, or a mistake in the command line.
    """
    argv = expand_flagfiles(argv)
    workdir = last_value(argv, "workdir")
    if not workdir:
        raise ConfigError("--workdir is not set: name the folder of a run")
    named = last_value(argv, "task")
    allow([named, last_value(argv, "data.dataset"), *_code(argv)])
    config = read_config(workdir)
    task = config.run.task
    if named and named != task:
        raise ConfigError(f"--task={named}: --workdir={workdir} is a run of --task={task}")
    components = request_components(task_class(task), kind)
    request = parse(argv, components, user=f"a run of --task={task}")[0]
    for name in components.keys() - {"run", "distributed"}:
        config = _move(config, name, set_in(request, name))
    return request, config


def set_in(request: Config, component: str) -> dict[str, Any]:
    """What a request sets instead of the run's own values in one component: field -> value."""
    values = vars(getattr(request, component)) if component in request.components else {}
    return {name: value for name, value in values.items() if value is not None}


def _move(config: Config, component: str, moved: dict[str, Any]) -> Config:
    """The configuration with other values of one component."""
    if not moved:
        return config
    places = {n: x for n, x in moved.items() if component == "data" and n in PLACES}
    if "dataset" in places and hasattr(config.data, "of"):
        data = config.data.of(moved["dataset"])
        config = dataclasses.replace(config, components={**config.components, "data": data})
    for name, others in getattr(config.components[component], "resets", {}).items():
        if name in moved:
            moved = dict.fromkeys(others) | moved
    try:
        config = config.replace(component, **moved)
    except ValueError as error:
        cls = type(config.components[component])
        raise ConfigError(name_flags(str(error), component, cls)) from None
    return without_kept(config, places) if places else config


def request_components(cls: type, kind: str) -> dict[str, type]:
    """Flag components of such a command, among them where the data of the run is now."""
    components = {"run": request_class(cls, kind), "distributed": DistributedConfig}
    data = cls.components.get("data")
    fields = {f.name: f for f in dataclasses.fields(data)} if data else {}
    names = MOVABLE
    if kind == "evaluate_request" and set(OF_OTHER_TEXT) <= set(fields):
        names += OF_OTHER_TEXT
    movable = {"data": [(n, *moved_flag(fields[n], kind)) for n in names if n in fields]}
    for component, other in cls.components.items():
        for f in dataclasses.fields(other):
            if kind.removesuffix("_request") in f.metadata.get("at_use", ()):
                movable.setdefault(component, []).append((f.name, *flag_at_use(f)))
    for component, declared in movable.items():
        if declared:
            components[component] = dataclasses.make_dataclass("Moved", declared, frozen=True)
    return components


@contextlib.contextmanager
def tells_how_to_move(config: Config) -> Iterator[None]:
    """Adds to the error about missing data of a run which flag names its new place."""
    try:
        yield
    except MissingFile as error:
        raise ConfigError(
            f"{error} (as --workdir={config.run.workdir} was trained with); if it moved, add "
            f"--{error.flag}=ITS_NEW_PLACE"
        ) from None


def request_help(argv: Sequence[str], kind: str, usage: str) -> str:
    """Help text of such a command, for the task or the run that the command line names."""
    argv = expand_flagfiles([a for a in argv if a not in HELP])
    task, workdir = last_value(argv, "task"), last_value(argv, "workdir")
    allow([task])
    if workdir and not task:
        task = recorded_task(workdir)
        if is_outside(task):
            task = None
    if not task:
        usage = f"{usage or ''}\n\nAdd --task=NAME or --workdir=D to see the flags of one task."
        return help_text(usage, {"run": REQUESTS[kind], "distributed": DistributedConfig})
    return help_text(usage, request_components(task_class(task), kind))


def request_class(cls: type, kind: str) -> type:
    """The dataclass of a command's flags.

    Raises:
      ConfigError: the task cannot be sampled from.
    """
    if kind == "sample_request" and not hasattr(cls, "sample"):
        raise ConfigError(f"--task={task_name(cls)} cannot be sampled from; use genai_jax.evaluate")
    return getattr(cls, kind, REQUESTS[kind])


def recorded_task(workdir: str, flag: str = "--workdir") -> str:
    """Reads the name of the task from the flags of the run in `workdir`; imports nothing."""
    return _recorded(workdir, flag).get("task", DEFAULT_TASK)


def _recorded(workdir: str, flag: str) -> dict[str, str]:
    """Flag name -> value as text, of the run in `workdir`.

    Every line sets one flag and says so in itself, so that what is checked here is what is parsed.
    """
    path = flags_path(workdir, flag)
    values = recorded_flags(workdir)
    for name in ("flagfile", "undefok"):
        if name in values:
            raise ConfigError(f"cannot read {path}: no run writes --{name}")
    return values


def read_config(workdir: str, flag: str = "--workdir") -> Config:
    """The configuration of the run in `workdir`, for use on this machine.

    The attention backend is reset to "auto": the run's own may be unavailable here, or unable to
    decode.

    Args:
      workdir: folder of the run.
      flag: the flag that named it, for error messages.

    Raises:
      ConfigError: there is no run, or it needs code outside this project that this process was not
        asked to use: a workdir never decides what is executed.
    """
    path, values = flags_path(workdir, flag), _recorded(workdir, flag)  # read once
    argv = [f"--{name}={value}" for name, value in values.items()]
    task = values.get("task", DEFAULT_TASK)
    if is_outside(task) and not is_allowed(task):
        raise ConfigError(
            f"{flag}={workdir} is a run of --task={task}, which is code outside genai_jax: to "
            f"allow it, add --task={task} to the command line"
        )
    with _errors_of(path):
        named = named_code(argv, components_of(task_class(task)))
    _check_allowed(named, workdir, flag)
    with _errors_of(path):
        config = _parse([*argv, f"--workdir={workdir}", "--attention=auto"], task)
    if config.run.task != task:
        raise ConfigError(f"cannot read {path}: it names two tasks")
    _check_allowed(config.outside(), workdir, flag)
    return with_kept(config)


def _check_allowed(names: Iterable[str], workdir: str, flag: str):
    if unnamed := [name for name in names if not is_allowed(name)]:
        raise ConfigError(
            f"{flag}={workdir} uses code outside genai_jax, {', '.join(unnamed)}: to allow it, add "
            f"--code={','.join(names)} to the command line"
        )


@contextlib.contextmanager
def _errors_of(path: Any) -> Iterator[None]:
    """Names the file with which something is wrong."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def open_run(cls: type, workdir: str, flag: str) -> Config:
    """The configuration of a run that another run builds on.

    Args:
      cls: class of the task that the run must have.
      workdir: folder of the run.
      flag: the flag that named it, with its dashes, for error messages.

    Raises:
      ConfigError: there is no run, or it is a run of another task.
    """
    expected, task = task_name(cls), recorded_task(workdir, flag)
    if task != expected:
        raise ConfigError(f"{flag}={workdir} is a run of --task={task}, not {expected}")
    allow([task])
    return read_config(workdir, flag)
