"""Writes an isoFLOP ladder as a study: its question, its analysis, and the flagfiles of its runs.

python -m genai_jax.ladder --flagfile=BASE --budgets=1e12,3e12 --widths=64,96,128 --output=DIR
python -m genai_jax.study --study=DIR --workdir=D

Any other flags of a run (--data.dataset=... --data.batch_size=...) are added to every file. A
comment at the top of each file gives N, D and C, counted from the shapes of the network.
In Python, `genai_jax.ladder(flags, output, budgets=..., widths=...)` does the same.
"""

import dataclasses
import os
import pathlib
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from genai_jax.callable_commands import callable_as, request_of
from genai_jax.command import run
from genai_jax.components import make_task, parse_run
from genai_jax.config import Config, ConfigError, asks_for_help, flag_names, help_text, parse
from genai_jax.data.shapes_only import shapes_only
from genai_jax.errors import printable
from genai_jax.files import expand_home
from genai_jax.flagfiles import expand_flagfiles
from genai_jax.keyword_flags import as_flags, run_arguments
from genai_jax.scaling.ladder import (
    LadderRequest,
    Rung,
    line_of,
    why_not_fitted,
    write_ladder,
)
from genai_jax.scaling.ladder import ladder as rungs_of
from genai_jax.scaling.reported import Rows
from genai_jax.scaling.study.folder import Counts, counts_of, flagfiles


@dataclasses.dataclass(frozen=True, repr=False)
class Ladder:
    """A ladder that was written. `print` shows the text that the command prints.

    Attributes:
      folder: the folder of the study.
      runs: a row for each: name, flagfile, budget (FLOPs), width, layers, steps, parameters
        (without embeddings), tokens, flops, and tokens per parameter.
      left_out: why runs, and flagfiles from before, do not belong to it.
      convention: how FLOPs are counted.
      why_not_fitted: why these runs are too few for a study; empty if they are not.
    """

    folder: pathlib.Path
    runs: Rows
    left_out: list[str]
    convention: str
    why_not_fitted: str

    def __str__(self) -> str:
        few = f"too few runs for a study: {self.why_not_fitted}; add budgets or widths"
        return "\n".join(
            [
                *self.left_out,
                *(_line(row) for row in self.runs),
                f"FLOPs: {self.convention}",
                *([few] if self.why_not_fitted else []),
            ]
        )

    def __repr__(self) -> str:
        return f"<Ladder of {len(self.runs)} runs in {self.folder}>"


def ladder(
    flags: Sequence[str] | Mapping[str, Any] | str | os.PathLike | Config,
    output: str | os.PathLike,
    **options: Any,
) -> Ladder:
    """Writes an isoFLOP ladder as a study into the folder `output`; `genai_jax.study` trains it.

    Args:
      flags: of the base, as `genai_jax.train` takes them, without the sizes that the ladder sets.
      output: folder for the flagfiles.
      **options: flags of the ladder command: `budgets` and `widths`, which may be lists,
        `aspect_ratio`, `head_dim`, `least_tokens`, `warmup`, ...

    Raises:
      ConfigError: budgets or widths that are not numbers, a width that is not a whole number of
        heads, a budget that suits no width, or flags that the command does not have.
    """
    request = request_of(LadderRequest, {**options, "output": os.fspath(output)})
    _check_output(request)
    of_file = isinstance(flags, str | os.PathLike)
    base = expand_home(os.fspath(flags)) if of_file else f"{request.output}/base.flags"
    command = ["python", "-m", "genai_jax.ladder", f"--flagfile={base}"]
    command += as_flags({**options, "output": request.output})
    if of_file:
        return _written(request, base, [], command)
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "base.flags"
        lines = [line_of(flag) for flag in expand_flagfiles(run_arguments(flags))]
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return _written(request, str(file), [], command)


def main(argv: Sequence[str]) -> int:
    if asks_for_help(argv):
        print(help_text(__doc__, {"run": LadderRequest}))
        return 0
    import jax

    request, base, more = _split(argv)
    jax.config.update("jax_platforms", "cpu")  # only shapes are needed
    print(_written(request, base, more, ["python", "-m", "genai_jax.ladder", *argv]))
    return 0


def _written(
    request: LadderRequest, base: str, more: Sequence[str], command: Sequence[str]
) -> Ladder:
    """Writes the ladder; `more` flags are added to every file."""

    def count(flags: Sequence[str]) -> Counts:
        config = parse_run([f"--flagfile={base}", *more, *flags, "--attention=auto"])
        with shapes_only():
            return counts_of(make_task(config), config)

    _refuse_what_is_set(request, [f"--flagfile={base}", *more])
    rungs, left_out = rungs_of(request, count)
    paths = write_ladder(request, base, more, rungs, printable(shlex.join(command)))
    folder = pathlib.Path(request.output)
    every = flagfiles(folder)
    left_out += [
        f"{path} is left from before and does not belong to this ladder"
        for path in every
        if path not in paths
    ]
    rows = Rows(_row(path, rung) for path, rung in zip(paths, rungs, strict=True))
    few = why_not_fitted(rungs) if set(every) == set(paths) else ""
    return Ladder(folder, rows, left_out, rungs[0].counts.convention, few)


def _row(path: pathlib.Path, rung: Rung) -> dict[str, Any]:
    return {
        "name": rung.name,
        "flagfile": str(path),
        "budget": rung.budget,
        "width": rung.width,
        "layers": rung.layers,
        "steps": rung.steps,
        "parameters": rung.counts.non_embedding,
        "tokens": rung.tokens,
        "flops": rung.flops,
        "tokens per parameter": rung.ratio,
    }


def _line(row: Mapping[str, Any]) -> str:
    return (
        f"{row['flagfile']}: N {row['parameters']:.3e}, D {row['tokens']:.3e}, "
        f"C {row['flops']:.3e}, D/N {row['tokens per parameter']:.3g}, {row['layers']} layer(s), "
        f"{row['steps']} steps"
    )


def _split(argv: Sequence[str]) -> tuple[LadderRequest, str, list[str]]:
    """The flags of the ladder, the base flagfile, and the flags to add to every file."""
    names = flag_names({"run": LadderRequest})
    name_of = lambda argument: argument.lstrip("-").split("=")[0]
    for argument in argv:
        if not argument.startswith("-") or "=" not in argument:
            raise ConfigError(f"argument {argument!r} is not a flag; write --name=value")
    bases = [a.split("=", 1)[1] for a in argv if name_of(a) == "flagfile"]
    if len(bases) != 1:
        raise ConfigError(
            f"--flagfile, the base of the ladder, must be given once, not {len(bases)} times"
        )
    own = [a for a in argv if name_of(a) in names]
    request = parse(own, {"run": LadderRequest})[0].run
    _check_output(request)
    more = [a for a in argv if a not in own and name_of(a) != "flagfile"]
    return request, expand_home(bases[0]), more


def _check_output(request: LadderRequest):
    if not request.output:
        raise ConfigError("--output is not set: name a folder for the flagfiles")


def _refuse_what_is_set(request: LadderRequest, flags: Sequence[str]):
    """Raises `ConfigError` if the base sets a size that has to follow from the width."""
    config = parse_run(flags)
    if request.component not in config.components:
        raise ConfigError(
            f"--component={request.component} is not a component of --task={config.run.task}; its "
            f"components are {', '.join(config.components)}"
        )
    part = config.components[request.component]
    for name in ("mlp_dim", "head_dim", "num_kv_heads"):
        if getattr(part, name, None) is not None:
            raise ConfigError(
                f"--{request.component}.{name}={getattr(part, name)} is set, but on a ladder it "
                "has to follow from the width: leave it unset"
            )


callable_as(ladder)

if __name__ == "__main__":
    run(main)
