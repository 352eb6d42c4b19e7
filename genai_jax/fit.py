"""Fits scaling laws to the runs in a CSV file, prints them and writes a report.

python -m genai_jax.fit --csv=runs.csv --output=report [--budget=1e20,1e21]
    [--parameters=COLUMN --tokens=COLUMN --loss=COLUMN --flops=COLUMN] [--held_out="flops>1e19"]
"""

import dataclasses
import pathlib
import platform
import shlex
from collections.abc import Sequence

from genai_jax.command import run
from genai_jax.config import ConfigError, asks_for_help, field, help_text, parse
from genai_jax.errors import printable
from genai_jax.files import writing_to


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


def main(argv: Sequence[str]) -> int:
    if asks_for_help(argv):
        print(help_text(__doc__, {"run": FitRequest}))
        return 0
    request = parse(argv, {"run": FitRequest})[0].run
    for name in ("csv", "output"):
        if not getattr(request, name):
            raise ConfigError(f"--{name} is not set")
    used = [request.parameters, request.tokens, request.loss, *filter(None, [request.flops])]
    if len({*used}) < len(used):
        raise ConfigError(
            "--parameters, --tokens, --loss, and --flops name four different columns, not "
            f"{', '.join(used)}"
        )
    if pathlib.Path(request.output).exists() and not pathlib.Path(request.output).is_dir():
        raise ConfigError(f"--output={request.output} is a file; name a folder for the report")
    budgets = _budgets(request.budget)
    # SciPy and Matplotlib, which --help and flag errors do without.
    from genai_jax.scaling.fits.analysis import scaling_law
    from genai_jax.scaling.fits.points import Columns, read_csv
    from genai_jax.scaling.report import write_report
    from genai_jax.scaling.report_text import text_of

    columns = Columns(
        request.parameters, request.tokens, request.loss, request.flops or None, request.run or None
    )
    data = read_csv(request.csv, columns, request.held_out)
    sections = scaling_law(
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
    print(f"{printable(request.csv)}: {len(data.points.loss)} runs, FLOPs: {convention}")
    print("\n".join(text_of(sections)))
    record = _record(request, argv, convention)
    with writing_to(f"--output={request.output}"):
        write_report(request.output, "Scaling law", sections, record=record)
    print(f"\nreport: {request.output}/index.html")
    return 0


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


def _record(request: FitRequest, argv: Sequence[str], convention: str) -> dict:
    import numpy
    import scipy

    versions = {
        "Python": platform.python_version(),
        "numpy": numpy.__version__,
        "scipy": scipy.__version__,
    }
    return {
        "commands": [printable(f"python -m genai_jax.fit {shlex.join(argv)}")],
        "environment": {**versions, "data": printable(request.csv), "FLOPs": convention},
    }


if __name__ == "__main__":
    run(main)
