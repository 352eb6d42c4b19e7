"""The flags that every task has, and how a command line becomes the configuration of one task."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from genai_jax.config import Config, ConfigError, field, flag_names, parse
from genai_jax.tasks import TASKS
from genai_jax.training.checkpoint import CheckpointConfig
from genai_jax.training.compiler import CompilerConfig
from genai_jax.training.distributed import DistributedConfig
from genai_jax.training.ema import EmaConfig
from genai_jax.training.loop import EvalConfig, ProfileConfig, TrainConfig
from genai_jax.training.optimizer import OptimizerConfig
from genai_jax.training.population import PopulationConfig
from genai_jax.training.sharding import MeshConfig
from genai_jax.training.workdir import flags_path

DTYPES = ("float32", "bfloat16", "float16")
ATTENTION = ("auto", "xla", "xla_chunked", "tpu", "gpu", "cudnn")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    task: str = field("language_model", "what the run learns", choices=tuple(TASKS))
    seed: int = field(0, "of parameters, data order, dropout and everything random", minimum=0)
    dtype: str = field("float32", "of the matmuls; parameters stay float32", choices=DTYPES)
    workdir: str = field("", "folder of the run", changeable=True)
    attention: str = field("auto", "attention backend", choices=ATTENTION, changeable=True)


SHARED = {
    "run": RunConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
    "checkpoint": CheckpointConfig,
    "optimizer": OptimizerConfig,
    "ema": EmaConfig,
    "mesh": MeshConfig,
    "profile": ProfileConfig,
    "distributed": DistributedConfig,
    "compiler": CompilerConfig,
    "population": PopulationConfig,
}


def components_of(task: str) -> dict[str, type]:
    """Name -> dataclass of the flag components of one task."""
    return SHARED | dict(TASKS[task].components)


def all_components() -> dict[str, type]:
    """Those of all tasks; where tasks have different ones of the same name, their fields joined."""
    found: dict[str, list[type]] = {}
    for task in TASKS:
        for name, cls in components_of(task).items():
            found.setdefault(name, []).append(cls)
    return {name: _joined(classes) for name, classes in found.items()}


def parse_run(argv: Sequence[str]) -> Config:
    """The configuration of a run: the shared components and those of its task.

    Raises:
      ConfigError: as `genai_jax.config.parse`, or a flag that the task does not have.
    """
    config, given = parse(argv, all_components())
    task = config.run.task
    components = components_of(task)
    _refuse_others(given, components, f"--task={task}")
    return parse(argv, components)[0]


def parse_request(argv: Sequence[str], kind: str) -> tuple[Any, Config]:
    """The flags of a command that works on an existing run, and the configuration of that run.

    Args:
      argv: the command line.
      kind: the attribute of a task that names its dataclass of flags: "sample_request" or
        "evaluate_request".
    """
    every = {"run": all_requests(kind)}
    found, given = parse(argv, every)
    if not found.run.workdir:
        raise ConfigError("--workdir is not set: say which run")
    config = read_config(found.run.workdir)
    task = config.run.task
    components = {"run": getattr(TASKS[task], kind)}
    _refuse_others(given, components, f"a run of --task={task}")
    return parse(argv, components)[0].run, config


def all_requests(kind: str) -> type:
    """The flags that any task's requests of a kind have."""
    return _joined([getattr(task, kind) for task in TASKS.values()])


def read_config(workdir: str, flag: str = "--workdir") -> Config:
    """The configuration of the run in `workdir`, which `flag` named, to be read on this machine.

    Attention is chosen anew: the run's own backend may not exist here, or not decode.
    """
    flagfile = f"--flagfile={flags_path(workdir, flag)}"
    return parse_run([flagfile, f"--workdir={workdir}", "--attention=auto"])


def _refuse_others(given: set[str], components: Mapping[str, type], user: str):
    """Raises `ConfigError` if a flag was given that none of the components has."""
    names = flag_names(components)
    for name in sorted(given - names):
        component, _, rest = name.rpartition(".")
        same = [n for n in sorted(names) if n.rpartition(".")[0] == component]
        has = ", ".join(f"--{n}" for n in same) if same else ", ".join(n for n in components)
        what = "flags there are" if rest and same else "components are"
        raise ConfigError(f"--{name} is not used by {user}, whose {what} {has}")


def _joined(classes: Iterable[type]) -> type:
    """One dataclass with the fields of all, each as the first that has it declares it.

    Where they allow different choices, all of them are allowed.
    """
    fields: dict[str, tuple] = {}
    for cls in classes:
        for f in dataclasses.fields(cls):
            first, metadata = fields.get(f.name, (f, f.metadata))
            if f.metadata["choices"]:
                choices = dict.fromkeys((*(metadata["choices"] or ()), *f.metadata["choices"]))
                metadata = {**metadata, "choices": tuple(choices)}
            fields[f.name] = first, metadata
    return dataclasses.make_dataclass(
        "Joined",
        [
            (name, f.type, dataclasses.field(default=f.default, metadata=metadata))
            for name, (f, metadata) in fields.items()
        ],
        frozen=True,
    )
