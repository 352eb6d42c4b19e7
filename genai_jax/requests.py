"""What the commands ask of a trained run, and what sampling returns.

A task adds its own flags in a subclass, which its attributes `sample_request` and
`evaluate_request` name.
"""

import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from genai_jax.config import field
from genai_jax.files import writing_to

# Of what a file's name says: `Files.name` has the seed, and the step is that of the checkpoint.
NAMED_OTHERWISE = ("workdir", "output", "seed", "checkpoint_step", "task", "mixers")


@dataclasses.dataclass(frozen=True)
class RunRequest:
    """Which model to use; the base of all requests."""

    workdir: str = field("", "Folder of the run.", path=True)
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
    output: str = field(
        "",
        "File to write. If empty, texts are printed, and images go to workdir/samples, named by "
        "the step and the flags that are set.",
        path=True,
    )


@dataclasses.dataclass(frozen=True)
class ExactEvaluateRequest(RunRequest):
    """For tasks none of whose metrics involve randomness."""

    batches: int = field(-1, "Held-out batches to evaluate on; -1: all.", minimum=-1)


@dataclasses.dataclass(frozen=True)
class EvaluateRequest(ExactEvaluateRequest):
    seed: int = field(0, "Random seed for metrics that involve randomness.", minimum=0)


def prepare_output(output: str):
    """Creates the folder of the file `output`; done before sampling, whose results it would lose.

    Raises:
      ConfigError: the file cannot be written.
    """
    if not output:
        return
    path = pathlib.Path(output)
    with writing_to(f"--output={output}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        if new or not path.is_fifo():  # whose reader would see its end
            open(path, "ab").close()
        if new:
            path.unlink()


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
    settings: str = ""  # end of the stem; see `distinguishing`

    def write(self, output: str, folder: pathlib.Path) -> list[str]:
        """Writes each kind next to `output`, or in `folder` if that is empty; returns the paths."""
        first = next(iter(self.writers))
        path = pathlib.Path(output) if output else folder / f"{self.name}{self.settings}{first}"
        path.parent.mkdir(parents=True, exist_ok=True)
        written = []
        for suffix, write in self.writers.items():
            target = path if suffix == first else path.with_name(path.stem + suffix)
            write(target)
            written.append(str(target))
        return written


def distinguishing(request: SampleRequest, step: int) -> str:
    """The part of a file's name that differs between requests: the step and the flags that are set.

    What a name cannot hold, or more than 100 characters, is replaced by a hash.
    """
    parts = [f"step-{step}"]
    for f in dataclasses.fields(request):
        value = getattr(request, f.name)
        if f.name not in NAMED_OTHERWISE and value != f.default:
            parts.append(f"{f.name}-{value}")
    text = "_".join(["", *parts])
    plain = re.sub(r"[^\w.,=-]+", "-", text)
    if plain == text and len(text) <= 100:
        return text
    return f"{plain[:100]}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"
