"""Flags of the training loop."""

import dataclasses
import re

from genai_jax.config import field


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: int = field(1000, "Steps of the whole run.", minimum=1, changeable=True)
    log_every: int = field(10, "Steps between rows of metrics.jsonl.", minimum=1, changeable=True)
    accumulate: int = field(
        1,
        "Microbatches per step, one in memory at a time; their gradients are averaged.",
        minimum=1,
    )
    progress: bool = field(
        True, "Print what is trained, a progress bar, and what came out.", changeable=True
    )
    wandb: str | None = field(
        None,
        "Project of Weights & Biases, or ENTITY/PROJECT, that rows and samples are sent to as "
        "well; none if unset.",
        changeable=True,
    )

    def __post_init__(self):
        if self.wandb is not None and not re.fullmatch(r"([^/\s]+/)?[^/\s]+", self.wandb):
            raise ValueError(f"--train.wandb={self.wandb} is neither PROJECT nor ENTITY/PROJECT")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    every: int = field(
        0, "Steps between evaluations; 0 evaluates only the last step.", minimum=0, changeable=True
    )
    batches: int = field(
        -1, "Held-out batches per evaluation; -1: all; 0: no evaluation.", minimum=-1,
        changeable=True,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    every: int = field(
        0,
        "Steps between samples, written to workdir/samples and TensorBoard; also after the last "
        "step. 0: no samples.",
        minimum=0,
        changeable=True,
    )
    count: int | None = field(
        None, "Samples each time; if unset, 16 images or 2 texts.", minimum=1, changeable=True
    )

    def __post_init__(self):
        if self.count is not None and not self.every:
            raise ValueError(f"--sample.count={self.count} needs --sample.every")


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    start: int = field(
        0, "Steps before the profile starts.", minimum=0, changeable=True, within_run=True
    )
    steps: int = field(0, "Steps to profile into workdir/profile.", minimum=0, changeable=True)
