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
from genai_jax.files import read_text, writing_to
from genai_jax.flagfiles import expand_flagfiles, flag_line
from genai_jax.scaling.fits.laws import Parametric
from genai_jax.scaling.fits.points import check_enough, check_spread, make_points
from genai_jax.scaling.study.folder import Counts
from genai_jax.scaling.study.settings import numbers

QUESTION = "# IsoFLOP ladder\n\nWhich model size reaches the lowest loss at each budget?\n\n"
ANALYSIS = "--study.analysis=scaling_law\n"
BASE_COMMENT = "# Flags that all runs of the ladder share; the ladder command writes this file.\n"
BEGIN, END = "<!-- ladder -->", "<!-- end of ladder -->"  # around its part of README.md


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


def why_not_fitted(rungs: Sequence[Rung]) -> str:
    """Why the scaling-law analysis would refuse these runs alone; empty if it would not."""
    points = make_points(
        [rung.counts.non_embedding for rung in rungs],
        [rung.tokens for rung in rungs],
        [1.0] * len(rungs),
        [rung.flops for rung in rungs],
    )
    try:
        check_enough(len(rungs), len(Parametric.coefficients), "the parametric law")
        check_spread(points)
    except ConfigError as error:
        return str(error)
    return ""


def write_ladder(
    request: LadderRequest, base: str, more: Sequence[str], rungs: Sequence[Rung], command: str
) -> list[pathlib.Path]:
    """Writes a study: one flagfile per run, named by budget and width, and what they share.

    The flags of the base go to base.flags, which every run includes, unless the base is that file.
    README.md has the question, the command, and a table of the runs; of one that exists, only the
    part between the comments `BEGIN` and `END` is replaced. study.flags is written if missing.

    Args:
      request: the flags of the ladder.
      base: path of the base flagfile.
      more: other flags to write into every file.
      rungs: the runs.
      command: the command line that asks for this ladder.

    Returns:
      The flagfiles of the runs.

    Raises:
      ConfigError: the folder cannot be written to, or has another base.flags.
    """
    folder = pathlib.Path(request.output)
    shared = _shared(folder / "base.flags", base)
    with writing_to(f"--output={folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        if shared:
            (folder / "base.flags").write_text(shared, encoding="utf-8")
        paths = [folder / f"{rung.name}.flags" for rung in rungs]
        for path, rung in zip(paths, rungs, strict=True):
            path.write_text(_flagfile(request, more, rung), encoding="utf-8")
        if not (folder / "study.flags").exists():
            (folder / "study.flags").write_text(ANALYSIS, encoding="utf-8")
        readme = folder / "README.md"
        before = read_text(readme) if readme.exists() else f"{QUESTION}{BEGIN}\n{END}\n"
        readme.write_text(_readme(before, rungs, command), encoding="utf-8")
    return paths


def _shared(target: pathlib.Path, base: str) -> str:
    """The contents of base.flags; empty if the base is that file."""
    if os.path.realpath(target) == os.path.realpath(base):
        return ""
    if target.exists() and not read_text(target).startswith(BASE_COMMENT):
        raise ConfigError(
            f"{target} is not from this command: choose another --output, or use it as --flagfile"
        )
    flags = expand_flagfiles([f"--flagfile={base}"])
    return BASE_COMMENT + "".join(f"{line_of(flag)}\n" for flag in flags)


def _readme(before: str, rungs: Sequence[Rung], command: str) -> str:
    head, begin, rest = before.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        return before
    rows = [
        f"| {r.name} | {r.counts.non_embedding:.4g} | {r.tokens:.4g} | {r.ratio:.3g} | "
        f"{r.flops:.4g} | {r.layers} | {r.steps:,} |"
        for r in rungs
    ]
    table = [
        "| run | non-embedding parameters N | tokens or examples D | D / N | FLOPs C | layers | "
        "steps |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]
    text = [f"```\n{command}\n```", "", *table, "", f"FLOPs: {rungs[0].counts.convention}."]
    return f"{head}{BEGIN}\n" + "\n".join(text) + f"\n{END}{tail}"


def line_of(flag: str) -> str:
    """The line of a flagfile for an argument ``--name=value``, or ``--name``."""
    name, equals, value = flag.lstrip("-").partition("=")
    return flag_line(name, value) if equals else f"--{name}"


def _flagfile(request: LadderRequest, more: Sequence[str], rung: Rung) -> str:
    counts = rung.counts
    flags = ["--flagfile=base.flags", *map(line_of, more), *_size_flags(request, rung.width)]
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
