"""The fit command, and the CSV files that it reads."""

import json
import types

import numpy as np
import pytest

from genai_jax.config import ConfigError
from genai_jax.fit import main
from genai_jax.scaling.fits.analysis import scaling_law
from genai_jax.scaling.fits.points import Columns, Points, make_points, read_csv
from genai_jax.scaling.fits.sections import _trust
from tests.scaling.test_fits import ladder, loss_of

HEADING = "name,N,D,L\n"
COLUMNS = Columns("N", "D", "L")


def write(path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_the_command_prints_the_law_and_writes_a_report(tmp_path, capsys):
    points = ladder(np.geomspace(1e18, 1e20, 4), sizes=5)
    rows = [f"r,{n},{d},{loss}\n" for n, d, _, loss in zip(*points, strict=True)]
    rows.append(f"large,1e9,1e11,{loss_of(1e9, 1e11)}\n")
    csv = write(tmp_path / "runs.csv", HEADING + "".join(rows))
    out = tmp_path / "report"
    flags = [f"--csv={csv}", f"--output={out}", "--parameters=N", "--tokens=D", "--loss=L",
             "--held_out=flops>2e20", "--budget=1e19", "--resamples=10"]  # fmt: skip
    assert main(flags) == 0
    printed = capsys.readouterr().out
    assert "21 runs, FLOPs: 6 N D" in printed
    assert "L = 1.69 + 406.4 / N^0.34 + 410.7 / D^0.28" in printed
    assert "1 runs were held out from all fits" in printed
    numbers = json.loads((out / "results.json").read_text())["numbers"]
    assert numbers["parametric/alpha"] == pytest.approx(0.34, rel=1e-3)
    assert numbers["parametric/alpha/low"] <= numbers["parametric/alpha/high"]
    assert numbers["isoflop/minima_inside"] == 4
    assert numbers["held_out/parametric/max_relative_error"] < 1e-4
    for name in ("law", "residuals", "one_variable", "isoflop", "optimum", "held_out"):
        assert (out / f"{name}.png").stat().st_size > 10_000, name
    assert "Compute-optimal runs" in (out / "index.html").read_text()
    with pytest.raises(ConfigError, match=r"budget=1e\+25 is outside the fitted range"):
        main([*flags, "--budget=1e25"])


def test_a_frontier_of_one_run_is_reported_and_the_rest_is_fitted():
    """No line can be fitted to the frontier if one run beats all larger ones."""
    points = ladder(np.geomspace(1e18, 1e20, 4), sizes=5)
    loss = points.loss.copy()
    loss[np.argmin(points.flops)] = 1.5
    hidden = np.arange(len(loss)) == np.argmax(points.flops)
    sections = scaling_law(points._replace(loss=loss), held_out=hidden, resamples=0)
    (single,) = (s for s in sections if s.title.endswith("size, tokens or compute alone"))
    assert any("Not fitted" in text for text in single.paragraphs)
    assert "held_out/parametric/max_relative_error" in sections[-1].numbers


def test_a_coefficient_of_any_size_is_said_to_be_undetermined(recwarn):
    wide = {"A": (np.float64(1e-200), np.float64(1e200)), "E": (np.float64(1.0), np.float64(1.1))}
    law = types.SimpleNamespace(intervals=lambda: wide, samples=[1], converged=True)
    assert "hardly determine A, whose" in _trust(law)
    assert not recwarn.list


def test_power_laws_are_not_used_beyond_their_minima():
    """Neither for a requested budget nor for one of the runs."""
    points = ladder(np.geomspace(1e18, 1e20, 3))
    sizes = points.parameters.max() * np.array([1.0, 2, 4])  # too large for their budget
    loss = loss_of(sizes, 1e21 / 6 / sizes)
    more = make_points(sizes, 1e21 / 6 / sizes, loss)
    both = Points(*(np.concatenate(pair) for pair in zip(points, more, strict=True)))
    optima = lambda **options: scaling_law(both, resamples=0, **options)[-1].tables[0].rows
    by = lambda rows, name: [row[0] for row in rows if row[1] == name]
    rows = optima(budgets=[3e19, 8e20])
    assert by(rows, "parametric") == [3e19, 8e20] and by(rows, "isoFLOP") == [3e19]
    assert by(optima(budgets=[3e19, 8e20], extrapolate=10), "isoFLOP") == [3e19, 8e20]
    assert {row[1] for row in optima(budgets=[8e20])} == {"parametric"}  # and can be plotted


def test_the_rows_of_a_run_are_its_curve(tmp_path):
    rows = [f"r{i},{10**i},{d},{9 - d - i}\n" for i in (1, 2) for d in (1, 2, 3)]
    data = read_csv(
        write(tmp_path / "c.csv", HEADING + "".join(rows)), COLUMNS._replace(run="name")
    )
    assert data.points.loss.tolist() == [5, 4] and data.points.flops.tolist() == [180, 1800]
    assert data.curves[1].parameters == 100 and data.curves[1].loss.tolist() == [6, 5, 4]
    assert not data.held_out.any()
    columns = COLUMNS._replace(run="name")
    hidden = read_csv(write(tmp_path / "c.csv", HEADING + "".join(rows)), columns, "N>50")
    assert hidden.held_out.tolist() == [False, True]
    assert [curve.parameters for curve in hidden.curves] == [10]
    with pytest.raises(ConfigError, match=r"matches 0 of 2 runs \(judged by their last rows"):
        read_csv(tmp_path / "c.csv", columns, "D<2")


def test_a_condition_holds_rows_out(tmp_path):
    csv = write(tmp_path / "c.csv", HEADING + "a,1,1,2\nb,2,2,2\nc,3,3,2\n")
    assert read_csv(csv, COLUMNS, "flops>20").held_out.tolist() == [False, True, True]
    assert read_csv(csv, COLUMNS, "N = 2").held_out.tolist() == [False, True, False]
    for condition, message in (
        ("N>5", "matches 0 of 3 rows"),
        ("N", "write one column"),
        ("N>1,D>1", "write one column"),
        ("tokens>1", "no column 'tokens'; its columns are name, N, D, L"),
        ("name=1", "line 2: name is 'a', not a number"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_csv(csv, COLUMNS, condition)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "no rows"),
        (HEADING, "no rows"),
        ("name,N,D,L,L\na,1,2,3,4\n", "has more than one column 'L'"),
        ("name,N,L\na,1,2\n", "no column 'D'; its columns are name, N, L"),
        (HEADING + "a,1,2,3\nb,,2,3\n", "line 3: N is '', not a number"),
        (HEADING + "a,1,2,3\nb,1,2\n", "line 3: L is '', not a number"),
        (HEADING + "a,1,2,x\n", "line 2: L is 'x', not a number"),
        (HEADING + "a,1,2,nan\n", "line 2: L is 'nan', not a number"),
        (HEADING + "a,1,0,3\n", "line 2: D is 0; it must be positive"),
        (HEADING + "a,1,2,3\n\nb,-4,2,3\n", "line 4: N is -4; it must be positive"),
        (HEADING + "a,1,inf,3\n", "line 2: D is inf; it must be positive"),
    ],
)
def test_a_bad_csv_names_the_row_and_the_column(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read_csv(write(tmp_path / "bad.csv", text), COLUMNS)


def test_bad_flags_are_one_line(tmp_path):
    csv = write(tmp_path / "c.csv", "parameters,tokens,loss\n" + "1e6,1e8,3\n" * 4)
    flags = [f"--csv={csv}", f"--output={tmp_path / 'r'}"]
    for more, message in (
        (["--budget=many"], "--budget=many: write positive FLOPs"),
        (["--extrapolate=0.5"], "extrapolate"),
        (["--flops=C"], "no column 'C'"),
        (["--parameters=tokens"], "name four different columns, not tokens, tokens, loss"),
        ([f"--output={csv}"], "is a file; name a folder for the report"),
        ([], "as many points as its 5 coefficients, not 4"),
    ):
        with pytest.raises(ConfigError, match=message):
            main([*flags, *more])
    with pytest.raises(ConfigError, match="--output is not set"):
        main(flags[:1])
    with pytest.raises(ConfigError, match="cannot read --csv=nowhere"):
        main(["--csv=nowhere", "--output=x"])
