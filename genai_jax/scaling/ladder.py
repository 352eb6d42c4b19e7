"""isoFLOP ladders: flagfiles for networks of several sizes, each trained on the same budgets.

A budget C is spent on every width. The depth follows from the width by a rule, and the number of
steps from the exact FLOPs per step, so that C is met to within half a step. This module does not
depend on a task: the caller provides the function from flags to `Counts`.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from genai_jax.config import LARGEST_INT, ConfigError, field
from genai_jax.files import writing_to
from genai_jax.flagfiles import flag_line
from genai_jax.scaling.study.folder import Counts
from genai_jax.scaling.study.settings import numbers

STUDY_FILES = {
    "README.md": "# IsoFLOP ladder\n\nWhich model size reaches the lowest loss at each budget?\n",
    "study.flags": "--study.analysis=scaling_law\n",
}


@dataclasses.dataclass(frozen=True)
class LadderRequest:
    output: str = field("", "Folder for the flagfiles.", path=True)
    budgets: str = field("", "Training budgets in FLOPs, comma-separated: 1e12,3e12.")
    widths: str = field("", "Network widths, comma-separated: 64,96,128.")
    component: str = field(
        "transformer",
        "Network component whose embed_dim, num_layers and num_heads the ladder sets.",
        choices=("transformer", "dit"),
    )
    aspect_ratio: float = field(
        32, "Width divided by depth; the resulting depth is rounded.", minimum=1
    )
    least_layers: int = field(2, "Smallest number of layers.", minimum=1)
    head_dim: int = field(
        32, "Width of an attention head; every network width must be a multiple of it.", minimum=1
    )
    least_tokens: float = field(
        0, "Smallest number of tokens, or examples, per non-embedding parameter; runs with fewer "
        "are left out.", minimum=0,
    )  # fmt: skip
    most_tokens: float | None = field(
        None, "Largest number of tokens, or examples, per non-embedding parameter; runs with more "
        "are left out; no limit if unset.", minimum=0,
    )  # fmt: skip
    least_steps: int = field(
        50, "Smallest number of training steps; runs with fewer are left out.", minimum=1
    )
    warmup: float | None = field(
        None, "Fraction of the steps for warm-up; the base's warmup_steps if unset.", minimum=0,
        maximum=1,
    )  # fmt: skip
    evaluations: int = field(
        0, "Number of evaluations during training; 0 evaluates after the last step only.", minimum=0
    )


class Rung(NamedTuple):
    """A run of the ladder."""

    budget: float
    width: int
    layers: int
    heads: int
    steps: int
    counts: Counts

    @property
    def name(self) -> str:
        return f"c{_short(self.budget)}_w{self.width}"

    @property
    def tokens(self) -> int:
        return self.steps * self.counts.tokens_per_step

    @property
    def flops(self) -> float:
        return self.steps * self.counts.flops_per_step

    @property
    def ratio(self) -> float:
        """Tokens per non-embedding parameter."""
        return self.tokens / self.counts.non_embedding


def ladder(
    request: LadderRequest, count: Callable[[Sequence[str]], Counts]
) -> tuple[list[Rung], list[str]]:
    """The runs of all budgets and widths, and a line for each one left out that says why.

    Args:
      request: the flags of the ladder.
      count: flags to add to those of the base -> counts of that network.

    Raises:
      ConfigError: budgets or widths that are not numbers, a width that is not a whole number of
        heads, a budget that suits no width.
    """
    budgets = numbers("budgets", request.budgets)
    widths = numbers("widths", request.widths)
    for name, values in (("budgets", budgets), ("widths", widths)):
        if not values:
            raise ConfigError(f"--{name} is not set: give a comma-separated list")
    sizes = {}
    for width in widths:
        if width % request.head_dim:
            raise ConfigError(
                f"--widths: {width:g} is not a multiple of --head_dim={request.head_dim}"
            )
        sizes[int(width)] = count(_size_flags(request, int(width)))
    rungs, left_out = [], []
    for budget in budgets:
        every = [_rung(request, budget, width, counts) for width, counts in sizes.items()]
        good = [rung for rung in every if not _why_not(request, rung)]
        left_out += [f"{r.name} is left out: {why}" for r in every if (why := _why_not(request, r))]
        if not good:
            raise ConfigError(
                f"--budgets: {budget:g} FLOPs suit no width; "
                f"{'; '.join(f'{r.name}: {_why_not(request, r)}' for r in every)}"
            )
        rungs += good
    return rungs, left_out


def _rung(request: LadderRequest, budget: float, width: int, counts: Counts) -> Rung:
    steps = round(budget / counts.flops_per_step)
    return Rung(budget, width, _layers(request, width), width // request.head_dim, steps, counts)


def _layers(request: LadderRequest, width: int) -> int:
    return max(request.least_layers, round(width / request.aspect_ratio))


def _size_flags(request: LadderRequest, width: int) -> list[str]:
    component = request.component
    return [
        f"--{component}.embed_dim={width}",
        f"--{component}.num_layers={_layers(request, width)}",
        f"--{component}.num_heads={width // request.head_dim}",
    ]


def _why_not(request: LadderRequest, rung: Rung) -> str:
    """Why a run is left out; empty if it is not."""
    if rung.steps > LARGEST_INT:
        return f"{rung.steps:.3g} steps, more than the {LARGEST_INT} of any run"
    if rung.steps < request.least_steps:
        return f"{rung.steps} step(s), --least_steps={request.least_steps}"
    if rung.ratio < request.least_tokens:
        return f"{rung.ratio:.3g} tokens per parameter, --least_tokens={request.least_tokens:g}"
    if request.most_tokens is not None and rung.ratio > request.most_tokens:
        return f"{rung.ratio:.3g} tokens per parameter, --most_tokens={request.most_tokens:g}"
    return ""


def write_ladder(
    request: LadderRequest, base: str, more: Sequence[str], rungs: Sequence[Rung]
) -> list[pathlib.Path]:
    """Writes one flagfile per run, named by budget and width, which includes the base.

    Unless the folder has them, it adds the two files that make it a study.

    Args:
      request: the flags of the ladder.
      base: path of the base flagfile.
      more: other flags to write into every file.
      rungs: the runs.

    Raises:
      ConfigError: the folder cannot be written to.
    """
    folder = pathlib.Path(request.output)
    with writing_to(f"--output={folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        included = os.path.relpath(pathlib.Path(base).resolve(), folder.resolve())
        paths = [folder / f"{rung.name}.flags" for rung in rungs]
        for path, rung in zip(paths, rungs, strict=True):
            path.write_text(_flagfile(request, included, more, rung), encoding="utf-8")
        for name, text in STUDY_FILES.items():
            if not (folder / name).exists():
                (folder / name).write_text(text, encoding="utf-8")
    return paths


def _flagfile(request: LadderRequest, included: str, more: Sequence[str], rung: Rung) -> str:
    counts = rung.counts
    given = [flag_line(*flag.lstrip("-").split("=", 1)) for flag in more]
    flags = [flag_line("flagfile", included), *given, *_size_flags(request, rung.width)]
    flags.append(f"--train.steps={rung.steps}")
    if request.warmup is not None:
        flags.append(f"--optimizer.warmup_steps={round(request.warmup * rung.steps)}")
    if request.evaluations:
        flags.append(f"--eval.every={max(rung.steps // request.evaluations, 1)}")
    rule = 6 * counts.non_embedding * rung.tokens
    return (
        f"# N {counts.non_embedding:,} non-embedding parameters of {counts.parameters:,}\n"
        f"# D {rung.tokens:,} tokens or examples, {rung.ratio:.4g} per non-embedding parameter\n"
        f"# C {rung.flops:.4e} FLOPs of a budget of {rung.budget:.4g} "
        f"({rung.flops / rung.budget - 1:+.2%}); 6 N D is {rule:.4e}\n" + "\n".join(flags) + "\n"
    )


def _short(budget: float) -> str:
    """A budget as "3e12" or "2.5e13"."""
    mantissa, exponent = f"{budget:.3e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
