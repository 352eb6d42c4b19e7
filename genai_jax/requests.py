"""What the commands ask of a trained run, and what sampling returns.

A task adds its own flags in a subclass, which its attributes `sample_request` and
`evaluate_request` name.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from genai_jax.config import ConfigError, field


@dataclasses.dataclass(frozen=True)
class RunRequest:
    """Which model to use; the base of all requests."""

    workdir: str = field("", "Folder of the run.")
    task: str | None = field(
        None, "Task of the run; needed only if its code lives outside genai_jax."
    )
    mixers: str | None = field(
        None,
        "Comma-separated mixers of the run's pattern whose code lives outside genai_jax.",
    )
    checkpoint_step: int | None = field(
        None, "Step of the checkpoint; the newest if unset.", minimum=0
    )
    ema: str | None = field(
        None,
        "Average of the parameters to use: one that the run kept, width:W, or none for the "
        "parameters themselves. If unset, the run's --ema.use.",
    )
    member: int = field(0, "Index of the run within a population, from 0.", minimum=0)


@dataclasses.dataclass(frozen=True)
class SampleRequest(RunRequest):
    seed: int = field(0, "Random seed for sampling.", minimum=0)
    output: str = field("", "File to write; a default place if empty.")


@dataclasses.dataclass(frozen=True)
class EvaluateRequest(RunRequest):
    seed: int = field(0, "Random seed for metrics that involve randomness.", minimum=0)
    batches: int = field(-1, "Held-out batches to evaluate on; -1: all.", minimum=-1)


@dataclasses.dataclass(frozen=True)
class ExactRequest(EvaluateRequest):
    """For tasks whose metrics involve no randomness."""

    def __post_init__(self):
        if self.seed:
            raise ValueError(f"seed={self.seed} has no effect: these metrics are not random")


def prepare_output(output: str):
    """Creates the folder of the file `output`; done before sampling, whose results it would lose.

    Raises:
      ConfigError: the file cannot be written.
    """
    if not output:
        return
    path = pathlib.Path(output)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        if new or not path.is_fifo():  # whose reader would see its end
            open(path, "ab").close()
        if new:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"cannot write to --output={output}: {error.strerror}") from None


class Sampled(Protocol):
    """The result of `Samples.sample`."""

    def write(self, output: str, folder: pathlib.Path) -> list[str]:
        """Writes to `output`, or to the default place if it is empty; returns lines to print."""


class Texts(NamedTuple):
    """Sampled texts."""

    texts: list[str]

    def write(self, output: str, folder: pathlib.Path) -> list[str]:
        """Writes all texts to the file `output`; without one, returns them to be printed."""
        del folder
        texts = self.texts
        if len(texts) > 1:
            texts = [f"--- sample {i + 1} of {len(texts)}\n{text}" for i, text in enumerate(texts)]
        if not output:
            return texts
        pathlib.Path(output).write_text("\n".join(texts) + "\n", encoding="utf-8")
        return []


class Files(NamedTuple):
    """Sampled images as files, each kind with the function that writes it."""

    name: str  # stem of the default file
    writers: Mapping[str, Callable[[pathlib.Path], None]]  # ".png", "_strip.png" -> writer

    def write(self, output: str, folder: pathlib.Path) -> list[str]:
        """Writes each kind next to `output`, or in `folder` if that is empty; returns the paths."""
        first = next(iter(self.writers))
        path = pathlib.Path(output) if output else folder / f"{self.name}{first}"
        path.parent.mkdir(parents=True, exist_ok=True)
        written = []
        for suffix, write in self.writers.items():
            target = path if suffix == first else path.with_name(path.stem + suffix)
            write(target)
            written.append(str(target))
        return written
