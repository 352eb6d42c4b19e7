"""Compares runs: the flags in which they differ, their final scores, and their curves.

python -m genai_jax.compare WORKDIR WORKDIR ... [--output=DIR] [--metrics=eval/loss,train/loss]

Prints tables; with --output, it also writes a page with the curves of all runs in one plot for
each metric. Runs of different families can be compared, and runs that are still going on.
In Python, `genai_jax.compare(workdirs, ...)` returns the tables and figures.
"""

import dataclasses
import os
import pathlib
import shlex
from collections.abc import Sequence
from typing import Any

from genai_jax.callable_commands import callable_as, request_of
from genai_jax.command import run
from genai_jax.config import ConfigError, asks_for_help, field, help_text, parse, refuse_set
from genai_jax.errors import printable
from genai_jax.files import expand_home, writing_to
from genai_jax.scaling.reported import Report


@dataclasses.dataclass(frozen=True)
class CompareRequest:
    output: str = field("", "Folder for the report; none is written if unset.", path=True)
    metrics: str = field(
        "", "Metrics to plot, comma-separated; train/loss and all held-out metrics that the runs "
        "share if unset.",
    )  # fmt: skip
    over: str = field("step", "Quantity on the horizontal axis.", choices=("step", "flops"))


def compare(workdirs: Sequence[str | os.PathLike], **flags: Any) -> Report:
    """Compares runs; nothing is written unless `output` names a folder.

    Args:
      workdirs: of the runs.
      **flags: those of the compare command: `metrics` and `over` choose the figures, `output` is
        the folder for the report.

    Raises:
      ConfigError: a folder without a run, a metric that no run has, or flags that the command does
        not have.
    """
    if isinstance(workdirs, str | os.PathLike):
        raise ConfigError(f"workdirs is a list of folders, not {os.fspath(workdirs)!r}")
    folders = [expand_home(os.fspath(workdir)) for workdir in workdirs]
    return _compared(request_of(CompareRequest, flags), folders)


def main(argv: Sequence[str]) -> int:
    if asks_for_help(argv):
        print(help_text(__doc__, {"run": CompareRequest}))
        return 0
    request = parse([a for a in argv if a.startswith("-")], {"run": CompareRequest})[0].run
    workdirs = [expand_home(a) for a in argv if not a.startswith("-")]
    if not request.output:
        refuse_set("run", request, ("metrics", "over"), "has no effect without --output")
    command = f"python -m genai_jax.compare {shlex.join(argv)}"
    report = _compared(request, workdirs, command, figures=bool(request.output))
    print(report)
    if report.page:
        print(f"\nreport: {report.page}")
    return 0


def _compared(
    request: CompareRequest, workdirs: Sequence[str], command: str = "", figures: bool = True
) -> Report:
    """Reads and compares the runs, and writes the report."""
    if not workdirs:
        raise ConfigError("no runs are named: write their workdirs, as compare runs/a runs/b")
    if pathlib.Path(request.output).is_file():
        raise ConfigError(f"--output={request.output} is a file; name a folder for the report")
    # Matplotlib and jax, which --help and flag errors do without.
    from genai_jax.scaling.report import write_report
    from genai_jax.scaling.run_comparison import (
        curves_section,
        flags_section,
        read_runs,
        scores_section,
    )

    runs = read_runs(workdirs)
    metrics = [name.strip() for name in request.metrics.split(",") if name.strip()]
    sections = [flags_section(runs), scores_section(runs)]
    if figures:
        sections.append(curves_section(runs, metrics, request.over))
    if not request.output:
        return Report(sections)
    commands = [printable(command)] if command else []
    with writing_to(f"--output={request.output}"):
        write_report(request.output, "Runs compared", sections, record={"commands": commands})
    return Report(sections, pathlib.Path(request.output) / "index.html")


callable_as(compare)

if __name__ == "__main__":
    run(main)
