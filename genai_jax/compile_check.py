"""Compiles a run's training step for devices that need not be present: does it fit, how fast is it?

python -m genai_jax.compile_check --flagfile=F --topology=v5p:8x8x8 [--flag=value ...]

Also says what the whole run of --train.steps costs in FLOPs, time, and chip-hours. With
--compiles=false no compiler is needed: the cost is a lower bound and one at an assumed MFU.
In Python, `genai_jax.compile_check(flags, topology, ...)` returns the report.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from genai_jax.callable_commands import callable_as, request_of
from genai_jax.command import run
from genai_jax.components import make_task, parse_run
from genai_jax.config import Config, ConfigError, asks_for_help, field, flag_names, help_text, parse
from genai_jax.data.shapes_only import shapes_only
from genai_jax.files import read_json, writing_to
from genai_jax.keyword_flags import as_flags, run_arguments
from genai_jax.scaling.chips import EXAMPLES, Topology
from genai_jax.scaling.compile_report import DoesNotFit, add_whole_run, check, facts, prepared
from genai_jax.scaling.compile_text import as_text, side_by_side
from genai_jax.training.sharding import make_mesh, placements


@dataclasses.dataclass(frozen=True)
class CheckRequest:
    topology: str = field(
        "", "Devices to compile for, as chip:shape (v5p:8x8x8, h200:1x32x8), or cpu:N."
    )
    slices: int = field(
        1, "Number of slices of that shape, linked by the data-center network.", minimum=1
    )
    compare: str = field(
        "", "Flagfile of a second run to compile and compare with the first.", path=True
    )
    output: str = field("", "File for the report, as JSON.", path=True)
    program: str = field("", "File for the text of the compiled program.", path=True)
    dump_shardings: str = field(
        "", "File for a list of all parameters with their shardings; - prints it.", path=True
    )
    compiles: bool = field(
        True, "Whether to compile; if false, only what is known without compiling is reported."
    )
    assumed_mfu: float = field(
        0.4, "Model FLOPs utilization assumed for the cost of the whole run; without effect if "
        "compiling predicts the time of a step.", minimum=0.01, maximum=1,
    )  # fmt: skip


class CompileReport(dict[str, Any]):
    """What the command writes as JSON: memory, FLOPs, collectives, predicted time, cost.

    `print` shows the text that the command prints.

    Attributes:
      text: that text.
      other: the report of the second run, with `compare`; else None.
    """

    def __init__(self, values: Mapping, text: str, other: "CompileReport | None" = None):
        super().__init__(values)
        self.text, self.other = text, other

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"<CompileReport: {', '.join(self)}>"


def compile_check(
    flags: Sequence[str] | Mapping[str, Any] | str | os.PathLike | Config,
    topology: str,
    **options: Any,
) -> CompileReport:
    """Compiles a run's training step for devices that need not be present, and reports on it.

    The command runs in a process of its own: this one may have initialized other devices. The
    compilers that `make targets` installs have to be on `PYTHONPATH`. A step that does not fit is
    not an error: its report has ``fits`` False and names the ``largest`` buffers.

    Args:
      flags: of the run, as `genai_jax.train` takes them.
      topology: devices to compile for, such as "v5p:8x8x8" or "cpu:8".
      **options: flags of the compile_check command: `compiles=False` estimates the cost without a
        compiler; `slices`, `assumed_mfu`, `output`, `program`, `compare`, ...

    Raises:
      ConfigError: a mistake in the flags, an unknown topology, or a compiler that is not installed.
    """
    request = request_of(CheckRequest, {**options, "topology": topology})
    of_run = run_arguments(flags)
    with tempfile.TemporaryDirectory() as folder:
        output = pathlib.Path(request.output or pathlib.Path(folder) / "report.json").absolute()
        asked = as_flags({**options, "topology": topology, "output": output})
        text = _in_a_process([*of_run, *asked])
        reports = [read_json(output)]
        if request.compare:
            second = output.with_name(f"{output.stem}.2{output.suffix}")
            reports.append(read_json(second))
    other = CompileReport(reports[1], as_text(request.compare, reports[1])) if reports[1:] else None
    return CompileReport(reports[0], text, other)


def _in_a_process(argv: Sequence[str]) -> str:
    """What the command prints in a process of its own."""
    root = str(pathlib.Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), root]))
    result = subprocess.run(
        [sys.executable, "-m", "genai_jax.compile_check", *argv],
        env=os.environ | {"PYTHONPATH": path}, stdin=subprocess.DEVNULL, capture_output=True,
        text=True,
    )  # fmt: skip
    if result.returncode not in (0, 1) or (result.returncode == 1 and not result.stdout):
        lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        if not lines:
            raise RuntimeError(f"the compile check ended with {result.returncode}: {result.stderr}")
        raise ConfigError(lines[-1].removeprefix("error: "))
    return result.stdout.rstrip()


def main(argv: Sequence[str]) -> int:
    if asks_for_help(argv):
        print(help_text(__doc__, {"run": CheckRequest}) + "\n\nand every flag of the train command")
        return 0
    request, rest = _split(argv)
    if not request.topology:
        raise ConfigError(f"--topology is not set; examples are {EXAMPLES}")
    topology = Topology(request.topology, request.slices)
    topology.prepare(request.compiles)
    runs = [rest]
    if request.compare:
        flags = [a for a in rest if not a.startswith("--flagfile=")]
        runs.append([f"--flagfile={request.compare}", *flags])
    configs = [parse_run(argv) for argv in runs]  # reports mistakes before anything is compiled
    code, report = _check(request, topology, runs[0], configs[0], "")
    if request.compare:
        print()
        second, other = _check(request, topology, runs[1], configs[1], ".2")
        print(f"\n{side_by_side(report, other)}")
        code = max(code, second)
    return code


def _split(argv: Sequence[str]) -> tuple[CheckRequest, list[str]]:
    """The flags of this command, and those of the run, each as one --name=value argument."""
    argv = list(argv)
    for i in range(len(argv) - 1, 0, -1):
        if argv[i - 1] in ("--flagfile", "-flagfile"):
            argv[i - 1 : i + 1] = [f"--flagfile={argv[i]}"]
    names = flag_names({"run": CheckRequest})
    given = {a: a.lstrip("-").split("=")[0] for a in argv if a.startswith("-")}
    own = [a for a, name in given.items() if {name, name.removeprefix("no")} & names]
    for argument in own:
        if "=" not in argument and given[argument].removeprefix("no") != "compiles":
            raise ConfigError(f"{argument} needs a value: write {argument}=VALUE")
    request = parse(own, {"run": CheckRequest})[0].run
    if not request.compiles and request.program:
        raise ConfigError("--program needs the compiled step: drop --compiles=false")
    return request, [a for a in argv if a not in own]


def _check(
    request: CheckRequest, topology, argv: Sequence[str], config: Config, suffix: str
) -> tuple[int, dict]:
    """Compiles one run and prints the report; returns (1 if it does not fit, the report)."""
    named = next((a.split("=", 1)[1] for a in argv if "flagfile=" in a), "command-line flags")
    mesh = make_mesh(config.mesh, topology.devices(request.compiles))
    with shapes_only():
        built = prepared(make_task(config), config, mesh)
    if request.dump_shardings:
        params, rules = built.compiled.shapes.params, built.task.partition_rules
        shardings = placements(params, rules, built.compiled.mesh)
        _write(request, "dump_shardings", suffix, shardings)
    program = None
    try:
        if request.compiles:
            report, program = check(config, topology, built)
        else:
            report = facts(config, topology, built)
    except DoesNotFit as problem:
        report = problem.report
    add_whole_run(report, config, topology, request.assumed_mfu)
    print(as_text(named, report))
    if request.output:
        _write(request, "output", suffix, json.dumps(report, indent=1) + "\n")
    if request.program and program:
        _write(request, "program", suffix, program)
    return (0 if report.get("fits", True) else 1), report


def _write(request: CheckRequest, name: str, suffix: str, text: str):
    """Writes to the file that the flag `name` says; prints if that is "-"."""
    path = getattr(request, name)
    if path == "-":
        print(text)
        return
    target = pathlib.Path(path)
    target = target.with_name(target.stem + suffix + target.suffix)
    with writing_to(f"--{name}={path}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")


callable_as(compile_check)

if __name__ == "__main__":
    run(main)
