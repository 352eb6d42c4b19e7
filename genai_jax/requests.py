"""What the commands ask of a trained run, and what a draw from it is.

A task adds flags of its own by a subclass, which its class names (`sample_request`,
`evaluate_request`).
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from genai_jax.config import field


@dataclasses.dataclass(frozen=True)
class SampleRequest:
    workdir: str = field("", "folder of the run")
    checkpoint_step: int | None = field(None, "step to draw from; the newest if unset", minimum=0)
    ema: str | None = field(
        None, "average to draw from: one that the run kept, width:W, or none; --ema.use if unset"
    )
    member: int = field(0, "of a population, which run to draw from", minimum=0)
    seed: int = field(0, "of the draws", minimum=0)
    output: str = field("", "file to write")


@dataclasses.dataclass(frozen=True)
class EvaluateRequest:
    workdir: str = field("", "folder of the run")
    checkpoint_step: int | None = field(None, "step to score; the newest if unset", minimum=0)
    ema: str | None = field(
        None, "average to score: one that the run kept, width:W, or none; --ema.use if unset"
    )
    member: int = field(0, "of a population, which run to score", minimum=0)
    seed: int = field(0, "of what is random in the scores", minimum=0)
    batches: int = field(-1, "held-out batches; -1: all", minimum=-1)


class Drawn(Protocol):
    """The result of `Task.sample`."""

    def write(self, output: str, folder: pathlib.Path) -> list[str]:
        """Writes to `output`, or where none is given, by default; returns lines to print."""


class Texts(NamedTuple):
    """Drawn texts."""

    texts: list[str]

    def write(self, output: str, folder: pathlib.Path) -> list[str]:
        """All texts in the file `output`, or printed."""
        del folder
        texts = self.texts
        if len(texts) > 1:
            texts = [f"--- sample {i + 1} of {len(texts)}\n{text}" for i, text in enumerate(texts)]
        if not output:
            return texts
        pathlib.Path(output).write_text("\n".join(texts) + "\n", encoding="utf-8")
        return []


class Files(NamedTuple):
    """Drawn pictures, each kind with the function that writes it."""

    name: str  # of the default file, without suffix
    writers: Mapping[str, Callable[[pathlib.Path], None]]  # ".png", "_strip.png" -> writer

    def write(self, output: str, folder: pathlib.Path) -> list[str]:
        """Each kind beside `output`, or in `folder`; returns the paths."""
        first = next(iter(self.writers))
        path = pathlib.Path(output) if output else folder / f"{self.name}{first}"
        path.parent.mkdir(parents=True, exist_ok=True)
        written = []
        for suffix, write in self.writers.items():
            target = path if suffix == first else path.with_name(path.stem + suffix)
            write(target)
            written.append(str(target))
        return written
