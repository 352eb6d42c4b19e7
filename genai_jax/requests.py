"""What the commands ask of a trained run, and what sampling returns.

A task adds flags of its own by a subclass, which its class names (`sample_request`,
`evaluate_request`).
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from genai_jax.config import field


@dataclasses.dataclass(frozen=True)
class RunRequest:
    """Which model to use; the base of all requests."""

    workdir: str = field("", "Folder of the run.")
    task: str | None = field(
        None, "Task of the run; needed only for one whose code lives outside of genai_jax."
    )
    mixers: str | None = field(
        None,
        "Mixers of the run's pattern whose code lives outside of genai_jax, comma-separated.",
    )
    checkpoint_step: int | None = field(
        None, "Step of the checkpoint; the newest if unset.", minimum=0
    )
    ema: str | None = field(
        None,
        "Average of the parameters: one that the run kept, width:W, or none; --ema.use of the run "
        "if unset.",
    )
    member: int = field(0, "Number of the run within a population.", minimum=0)


@dataclasses.dataclass(frozen=True)
class SampleRequest(RunRequest):
    seed: int = field(0, "Random seed for sampling.", minimum=0)
    output: str = field("", "File to write.")


@dataclasses.dataclass(frozen=True)
class EvaluateRequest(RunRequest):
    seed: int = field(0, "Random seed of what is random in the metrics.", minimum=0)
    batches: int = field(-1, "Held-out batches to evaluate on; -1: all.", minimum=-1)


class Sampled(Protocol):
    """The result of `Samples.sample`."""

    def write(self, output: str, folder: pathlib.Path) -> list[str]:
        """Writes to `output`, or else to its default place; returns lines to print."""


class Texts(NamedTuple):
    """Sampled texts."""

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
    """Sampled pictures, each kind with the function that writes it."""

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
