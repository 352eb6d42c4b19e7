"""What is asked of a trained run, by the commands and by `genai_jax.load`.

A task adds its own flags in a subclass, which its attributes `sample_request` and
`evaluate_request` name.
"""

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from genai_jax.config import ConfigError, field
from genai_jax.sampled import ARRAY_SUFFIXES, Origin
from genai_jax.sampled import Files as Files  # for families outside this project
from genai_jax.sampled import Texts as Texts

BEST = "best"  # in place of a step
# Of what a file's name says: `Files.name` has the seed, and the step is that of the checkpoint.
NAMED_OTHERWISE = ("workdir", "output", "seed", "checkpoint_step", "task", "code")


@dataclasses.dataclass(frozen=True)
class RunRequest:
    """Which model to use; the base of all requests."""

    workdir: str = field("", "Folder of the run.", path=True)
    task: str | None = field(
        None, "Task of the run; needed only if its code lives outside genai_jax."
    )
    code: str | None = field(
        None,
        "Comma-separated names, as my_package.my_module:Name, of the code outside genai_jax that "
        "the run uses besides its task.",
    )
    checkpoint_step: str | None = field(
        None,
        "Step of the checkpoint, or best for the one with the lowest held-out loss; the newest if "
        "unset.",
    )
    ema: str | None = field(
        None,
        "Average of the parameters to use: one that the run kept, width:W, or none for the "
        "parameters themselves. If unset, the run's --ema.use.",
    )
    member: int = field(0, "Index of the run within a population, from 0.", minimum=0)

    def step(self) -> int | str | None:
        """The step of the checkpoint, "best", or None for the newest.

        Raises:
          ConfigError: another text.
        """
        text = self.checkpoint_step
        if text is None or text == BEST:
            return text
        if not (text.isascii() and text.isdigit() and len(text) <= 10):
            raise ConfigError(f"--checkpoint_step={text} is not the number of a step, or {BEST}")
        return int(text)


@dataclasses.dataclass(frozen=True)
class SampleRequest(RunRequest):
    seed: int = field(0, "Random seed for sampling.", minimum=0)
    output: str = field(
        "",
        "File to write; its suffix says what is written, and a name that ends in / is a folder. If "
        "empty, texts are printed, and images go to workdir/samples, named by the step and the "
        "flags that are set.",
        path=True,
    )
    suffixes: ClassVar[tuple[str, ...] | None] = None  # of `output`; None: not known beforehand
    in_training: ClassVar[int] = 16  # `num_samples` of --sample.every


@dataclasses.dataclass(frozen=True)
class ArrayRequest(SampleRequest):
    """For tasks that sample images, signals, or videos: `sampled.Arrays`."""

    annotate: bool = field(
        True,
        "Arrange the images of a picture by class, with classes, times, and the like written "
        "around them, and begin rows of edits with the original; false: the samples alone.",
    )
    suffixes: ClassVar = ARRAY_SUFFIXES


@dataclasses.dataclass(frozen=True)
class ExactEvaluateRequest(RunRequest):
    """For tasks none of whose metrics involve randomness."""

    batches: int = field(-1, "Held-out batches to evaluate on; -1: all.", minimum=-1)

    def changing_scores(self) -> dict[str, Any]:
        """The flags of a family that were set: what the scores depend on besides the model."""
        common = {f.name for f in dataclasses.fields(EvaluateRequest)}
        own = [f for f in dataclasses.fields(self) if f.name not in common]
        values = {f.name: getattr(self, f.name) for f in own}
        return {f.name: values[f.name] for f in own if values[f.name] != f.default}


@dataclasses.dataclass(frozen=True)
class EvaluateRequest(ExactEvaluateRequest):
    seed: int = field(0, "Random seed for metrics that involve randomness.", minimum=0)


def distinguishing(
    request: SampleRequest, step: int, changed: Mapping[str, Any] = MappingProxyType({})
) -> str:
    """The part of a file's name that differs between requests: the step and the flags that are set.

    What a name cannot hold, or more than 100 characters, is replaced by a hash. `changed` are the
    flags of the run that have another value here, by name.
    """
    parts = [f"step-{step}"]
    for f in dataclasses.fields(request):
        value = getattr(request, f.name)
        if f.name not in NAMED_OTHERWISE and value != f.default:
            parts.append(f"{f.name}-{value}")
    parts += [f"{name}-{value}" for name, value in changed.items()]
    text = "_".join(["", *parts])
    plain = re.sub(r"[^\w.,=-]+", "-", text)
    if plain == text and len(text) <= 100:
        return text
    return f"{plain[:100]}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def origin_of(
    request: RunRequest, step: int, changed: Mapping[str, Any] = MappingProxyType({})
) -> Origin:
    """What the files of samples record about the request that they answer.

    changed: the flags of the run that have another value here, by name.
    """
    values = {f.name: getattr(request, f.name) for f in dataclasses.fields(request)}
    left_out = ("workdir", "output", "checkpoint_step", "task", "code")
    settings = {n: x for n, x in values.items() if x is not None and n not in left_out}
    return Origin(step, settings | dict(changed), distinguishing(request, step, changed))
