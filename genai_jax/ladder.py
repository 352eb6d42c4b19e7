"""Writes an isoFLOP ladder as a study: its question, its analysis, and the flagfiles of its runs.

python -m genai_jax.ladder --flagfile=BASE --budgets=1e12,3e12 --widths=64,96,128 --output=DIR
python -m genai_jax.study --study=DIR --workdir=D

Any other flags of a run (--data.dataset=... --data.batch_size=...) are added to every file. A
comment at the top of each file gives N, D and C, counted from the shapes of the network.
"""

import pathlib
import shlex
from collections.abc import Sequence

from genai_jax.command import run
from genai_jax.components import make_task, parse_run
from genai_jax.config import ConfigError, asks_for_help, flag_names, help_text, parse
from genai_jax.data.shapes_only import shapes_only
from genai_jax.errors import printable
from genai_jax.files import expand_home
from genai_jax.scaling.ladder import LadderRequest, ladder, why_not_fitted, write_ladder
from genai_jax.scaling.study.folder import counts_of, flagfiles


def main(argv: Sequence[str]) -> int:
    if asks_for_help(argv):
        print(help_text(__doc__, {"run": LadderRequest}))
        return 0
    import jax

    request, base, more = _split(argv)
    jax.config.update("jax_platforms", "cpu")  # only shapes are needed

    def count(flags: Sequence[str]):
        config = parse_run([f"--flagfile={base}", *more, *flags, "--attention=auto"])
        with shapes_only():
            return counts_of(make_task(config), config)

    _refuse_what_is_set(request, [f"--flagfile={base}", *more])
    rungs, left_out = ladder(request, count)
    command = printable(shlex.join(["python", "-m", "genai_jax.ladder", *argv]))
    paths = write_ladder(request, base, more, rungs, command)
    for line in left_out:
        print(line)
    every = flagfiles(pathlib.Path(request.output))
    for path in every:
        if path not in paths:
            print(f"{path} is left from before and does not belong to this ladder")
    for path, rung in zip(paths, rungs, strict=True):
        print(
            f"{path}: N {rung.counts.non_embedding:.3e}, D {rung.tokens:.3e}, "
            f"C {rung.flops:.3e}, D/N {rung.ratio:.3g}, {rung.layers} layer(s), {rung.steps} steps"
        )
    print(f"FLOPs: {rungs[0].counts.convention}")
    if set(every) == set(paths) and (why := why_not_fitted(rungs)):
        print(f"too few runs for a study: {why}; add budgets or widths")
    return 0


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
    if not request.output:
        raise ConfigError("--output is not set: name a folder for the flagfiles")
    more = [a for a in argv if a not in own and name_of(a) != "flagfile"]
    return request, expand_home(bases[0]), more


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


if __name__ == "__main__":
    run(main)
