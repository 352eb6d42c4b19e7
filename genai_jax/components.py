"""The flags that every task has, and how a command line becomes the configuration of one task."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from genai_jax.config import Config, ConfigError, field, parse
from genai_jax.data.loader import DataConfig
from genai_jax.tasks import TASKS
from genai_jax.training.checkpoint import CheckpointConfig
from genai_jax.training.ema import EmaConfig
from genai_jax.training.loop import EvalConfig, ProfileConfig, TrainConfig
from genai_jax.training.optimizer import OptimizerConfig
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
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "ema": EmaConfig,
    "mesh": MeshConfig,
    "profile": ProfileConfig,
}


def all_components() -> dict[str, type]:
    """Name -> dataclass of every flag component that any task has."""
    return SHARED | {n: cls for task in TASKS.values() for n, cls in task.components.items()}


def parse_run(argv: Sequence[str]) -> Config:
    """The configuration of a run: the shared components and those of its task.

    Raises:
      ConfigError: as `genai_jax.config.parse`, or a flag for a component that the task has not.
    """
    everything = all_components()
    config, given = parse(argv, everything)
    used = SHARED | dict(TASKS[config.run.task].components)
    for name in sorted(given):
        component = name.split(".")[0] if "." in name else "run"
        if component not in used:
            raise ConfigError(
                f"--{name} is not used by --task={config.run.task}, "
                f"whose components are {', '.join(c for c in used if c != 'run')}"
            )
    return Config({name: config.components[name] for name in used})


def parse_run_of(argv: Sequence[str], cls: type) -> Any:
    """The flags of a command that works on an existing run: one dataclass with a `workdir`."""
    request = parse(argv, {"run": cls})[0].run
    if not request.workdir:
        raise ConfigError("--workdir is not set: say which run")
    return request


def read_config(workdir: str) -> Config:
    """The configuration of the run in `workdir`, to be read on this machine.

    Attention is chosen anew: the run's own backend may not exist here, or not decode.
    """
    flagfile = f"--flagfile={flags_path(workdir)}"
    return parse_run([flagfile, f"--workdir={workdir}", "--attention=auto"])
