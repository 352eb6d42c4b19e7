"""Fits scaling laws to the runs in a CSV file, prints them and writes a report.

python -m genai_jax.fit --csv=runs.csv --output=report [--budget=1e20,1e21]
    [--parameters=COLUMN --tokens=COLUMN --loss=COLUMN --flops=COLUMN] [--held_out="flops>1e19"]

In Python, `genai_jax.fit(table, ...)` does the same for a file or a table, and returns the law.
"""

import dataclasses
import os
import pathlib
import platform
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from genai_jax.callable_commands import callable_as, request_of
from genai_jax.command import run
from genai_jax.config import ConfigError, asks_for_help, field, help_text, parse
from genai_jax.errors import printable
from genai_jax.files import writing_to

if TYPE_CHECKING:
    from genai_jax.scaling.fits.law_report import ScalingLaw
    from genai_jax.scaling.report_types import Record


@dataclasses.dataclass(frozen=True)
class FitRequest:
    csv: str = field("", "CSV file with a header line and one run per row.", path=True)
    output: str = field("", "Folder for the report.", path=True)
    parameters: str = field("parameters", "Column with the model sizes N.")
    tokens: str = field("tokens", "Column with the numbers of training tokens D.")
    loss: str = field("loss", "Column with the final losses.")
    flops: str = field("", "Column with the training FLOPs C; 6 N D if unset.")
    run: str = field(
        "", "Column with run names: the rows of a run are then its training curve, and its last "
        "row is its final result."
    )  # fmt: skip
    held_out: str = field(
        "", "Condition for rows to predict instead of fitting, such as flops>1e19 or tokens>=2e9."
    )
    budget: str = field(
        "", "Training budgets in FLOPs, comma-separated, to find the compute-optimal model size "
        "for; the budgets of the runs if unset."
    )  # fmt: skip
    extrapolate: float = field(
        1.0, "Largest factor by which a budget may lie outside the range of the runs.", minimum=1
    )
    resamples: int = field(
        500, "Number of bootstrap resamples for the confidence intervals; 0 omits them.", minimum=0
    )
    seed: int = field(0, "Random seed for the bootstrap.", minimum=0)
    loss_unit: str = field("nats per token", "Unit of the loss, for axis labels and table headers.")


def fit(table: Any, **flags: Any) -> "ScalingLaw":
    """Fits scaling laws to a table of runs; nothing is written unless `output` names a folder.

    Args:
      table: path of a CSV file, a list of dictionaries (one per run), or a mapping of column names
        to values, such as a data frame.
      **flags: those of the fit command: `parameters`, `tokens`, `loss`, and `flops` name columns;
        `held_out`, `budget`, `resamples`, `output`, ...

    Raises:
      ConfigError: a missing column, a value that is not a positive number, too few or too similar
        runs, or flags that the command does not have.
    """
    if isinstance(table, str | os.PathLike):
        return _fitted(request_of(FitRequest, {"csv": table, **flags}))
    if "csv" in flags:
        raise ConfigError("give either a table or csv=, not both")
    return _fitted(request_of(FitRequest, flags), table)


def main(argv: Sequence[str]) -> int:
    if asks_for_help(argv):
        print(help_text(__doc__, {"run": FitRequest}))
        return 0
    request = parse(argv, {"run": FitRequest})[0].run
    for name in ("csv", "output"):
        if not getattr(request, name):
            raise ConfigError(f"--{name} is not set")
    law = _fitted(request, command=f"python -m genai_jax.fit {shlex.join(argv)}")
    print(f"{law}\n\nreport: {law.page}")
    return 0


def _fitted(request: FitRequest, table: Any = None, command: str = "") -> "ScalingLaw":
    """Fits the laws to the CSV file of the request, or to `table`, and writes the report."""
    used = [request.parameters, request.tokens, request.loss, *filter(None, [request.flops])]
    if len({*used}) < len(used):
        raise ConfigError(
            "--parameters, --tokens, --loss, and --flops name four different columns, not "
            f"{', '.join(used)}"
        )
    if pathlib.Path(request.output).is_file():
        raise ConfigError(f"--output={request.output} is a file; name a folder for the report")
    budgets = _budgets(request.budget)
    # SciPy and Matplotlib, which --help and flag errors do without.
    from genai_jax.scaling.fits.analysis import analyzed
    from genai_jax.scaling.fits.law_report import ScalingLaw
    from genai_jax.scaling.fits.points import Columns, read_csv, read_table
    from genai_jax.scaling.report import write_report

    columns = Columns(
        request.parameters, request.tokens, request.loss, request.flops or None, request.run or None
    )
    if table is None:
        data = read_csv(request.csv, columns, request.held_out)
    else:
        data = read_table(table, columns, request.held_out)
    fits, sections = analyzed(
        data.points,
        held_out=data.held_out,
        curves=data.curves,
        budgets=budgets,
        seed=request.seed,
        resamples=request.resamples,
        extrapolate=request.extrapolate,
        loss_unit=printable(request.loss_unit),
    )
    convention = f"column {request.flops}" if request.flops else "6 N D (--flops is not set)"
    name = printable(request.csv) or "table"
    head = f"{name}: {len(data.points.loss)} runs, FLOPs: {convention}"
    page = None
    if request.output:
        record = _record(name, command, convention)
        with writing_to(f"--output={request.output}"):
            write_report(request.output, "Scaling law", sections, record=record)
        page = pathlib.Path(request.output) / "index.html"
    return ScalingLaw(sections, page, fits=fits, head=head)


def _budgets(text: str) -> list[float] | None:
    if not text:
        return None
    try:
        budgets = [float(part) for part in text.split(",")]
    except ValueError:
        budgets = []
    if not budgets or not all(0 < budget < float("inf") for budget in budgets):
        raise ConfigError(f"--budget={text}: write positive FLOPs, comma-separated, as 1e20,1e21")
    return budgets


def _record(data: str, command: str, convention: str) -> "Record":
    import numpy
    import scipy

    versions = {
        "Python": platform.python_version(),
        "numpy": numpy.__version__,
        "scipy": scipy.__version__,
    }
    return {
        "commands": [printable(command)] if command else [],
        "environment": {**versions, "data": data, "FLOPs": convention},
    }


callable_as(fit)

if __name__ == "__main__":
    run(main)
