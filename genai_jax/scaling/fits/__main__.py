"""Fits scaling laws to the runs in a CSV, prints them and writes a report.

python -m genai_jax.scaling.fits --csv=runs.csv --output=report [--budget=1e20,1e21]
    [--parameters=COLUMN --tokens=COLUMN --loss=COLUMN --flops=COLUMN] [--held_out="flops>1e19"]
"""

import dataclasses
from collections.abc import Sequence

from genai_jax.command import run
from genai_jax.config import ConfigError, field, help_text, parse


@dataclasses.dataclass(frozen=True)
class FitsRequest:
    csv: str = field("", "file of runs with a heading, one a row")
    output: str = field("", "folder for the report")
    parameters: str = field("parameters", "column of the sizes N")
    tokens: str = field("tokens", "column of the tokens D seen in training")
    loss: str = field("loss", "column of the final losses")
    flops: str = field("", "column of the training FLOPs C; 6 N D if unset")
    run: str = field("", "column that names runs whose rows are their curves, the last one the end")
    held_out: str = field("", "rows to predict, not to fit, such as flops>1e19 or tokens>=2e9")
    budget: str = field("", "FLOPs to find the best size for, comma-separated; the runs' if unset")
    extrapolate: float = field(1.0, "factor beyond the runs that a budget may be", minimum=1)
    resamples: int = field(500, "of the runs, for intervals; 0: none", minimum=0)
    seed: int = field(0, "of the resamples", minimum=0)
    loss_unit: str = field("nats per token", "for headings")


def main(argv: Sequence[str]) -> int:
    if {"--help", "-h", "--helpfull"} & set(argv):
        print(help_text(__doc__, {"run": FitsRequest}))
        return 0
    request = parse(argv, {"run": FitsRequest})[0].run
    for name in ("csv", "output"):
        if not getattr(request, name):
            raise ConfigError(f"--{name} is not set")
    budgets = _budgets(request.budget)
    from genai_jax.scaling.fits.analysis import scaling_law
    from genai_jax.scaling.fits.points import Columns, read_csv
    from genai_jax.scaling.report import write_report

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
        loss_unit=request.loss_unit,
    )
    convention = f"column {request.flops}" if request.flops else "6 N D, no column was named"
    print(f"{request.csv}: {len(data.points.loss)} runs, FLOPs: {convention}")
    print("\n".join(text_of(sections)))
    write_report(request.output, "Scaling law", sections, record=_record(request, argv, convention))
    print(f"\nreport: {request.output}/index.html")
    return 0


def _budgets(text: str) -> list[float] | None:
    if not text:
        return None
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < budget < float("inf") for budget in found):
        raise ConfigError(f"--budget={text}: write positive FLOPs, comma-separated, as 1e20,1e21")
    return found


def text_of(sections: Sequence) -> list[str]:
    """Lines of plain text: headings, paragraphs and tables of a report."""
    lines = []
    for section in sections:
        lines += ["", section.title, *section.paragraphs]
        for table in section.tables:
            cells = [table.columns, *([_cell(value) for value in row] for row in table.rows)]
            widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
            lines += ["  " + "  ".join(map(str.rjust, row, widths)) for row in cells]
    return lines


def _cell(value) -> str:
    if value is None or value != value:  # not a number: an interval without resamples
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _record(request: FitsRequest, argv: Sequence[str], convention: str) -> dict:
    import platform
    import shlex

    import numpy
    import scipy

    versions = {
        "Python": platform.python_version(),
        "numpy": numpy.__version__,
        "scipy": scipy.__version__,
    }
    return {
        "commands": [f"python -m genai_jax.scaling.fits {shlex.join(argv)}"],
        "environment": {**versions, "data": request.csv, "FLOPs": convention},
    }


if __name__ == "__main__":
    run(main)
