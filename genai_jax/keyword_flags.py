"""Python values as flags: what commands take on their command line, and Python as arguments."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from genai_jax.components import parse_run
from genai_jax.config import Config, ConfigError


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """{"train.steps": 10} -> ["--train.steps=10"]; None leaves a flag as it is.

    Raises:
      ConfigError: a value that no flag can have.
    """
    return [f"--{name}={_text(name, x)}" for name, x in values.items() if x is not None]


def _text(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple | range):
        return ",".join(_text(name, x) for x in value)
    if getattr(value, "ndim", None) == 0:  # a number of numpy or jax
        return _text(name, value.item())
    if isinstance(value, int | float):
        return repr(value)
    raise ConfigError(f"{name}={value!r} is a {type(value).__name__}, which no flag can be")


def run_flags(
    flags: Sequence[str] | Mapping[str, Any] | str | os.PathLike | Config, workdir: str
) -> Config:
    """The configuration of a run in `workdir`.

    Args:
      flags: of the train command, as `genai_jax.train` takes them.
      workdir: folder of the run.

    Raises:
      ConfigError: see `parse_run`; or no folder.
    """
    config = parse_run([*run_arguments(flags), *as_flags({"workdir": workdir})])
    if not config.run.workdir:
        raise ConfigError("workdir is empty: name a folder for the run's files")
    return config


def run_arguments(
    flags: Sequence[str] | Mapping[str, Any] | str | os.PathLike | Config,
) -> list[str]:
    """The flags of a run, as `genai_jax.train` takes them, as arguments of its command."""
    if isinstance(flags, Config):
        return as_flags(flags.items())
    if isinstance(flags, Mapping):
        return as_flags(flags)
    if isinstance(flags, str | os.PathLike):
        return [f"--flagfile={os.fspath(flags)}"]
    return [*map(str, flags)]


@contextlib.contextmanager
def prompts_in_a_file(flags: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The flags with a list of prompts as the file that ``--prompt_file`` reads."""
    prompts = flags.get("prompt")
    if prompts is None or isinstance(prompts, str):
        yield flags
        return
    lines = [str(prompt) for prompt in prompts]
    if not lines or any(len(line.splitlines()) > 1 or line.endswith("\n") for line in lines):
        raise ConfigError("prompt is one text, or a list of at least one, each of one line")
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "prompts"
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        rest = {name: value for name, value in flags.items() if name != "prompt"}
        yield {**rest, "prompt_file": str(file)}
