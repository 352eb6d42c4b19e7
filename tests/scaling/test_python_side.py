"""Commands called from Python: the same results as on the command line, and the same errors."""

import inspect
import json
import shutil

import numpy as np
import pytest

import genai_jax
from genai_jax import compare, compile_check, fit, ladder, study
from genai_jax.config import ConfigError
from genai_jax.scaling.fits.points import Columns, read_table
from genai_jax.scaling.reported import Rows
from tests.scaling.test_fits import ladder as points_of
from tests.scaling.test_fits import loss_of
from tests.scaling.test_run_comparison import run_in
from tests.scaling.test_study import TINY, write_study

COLUMNS = {"parameters": "N", "tokens": "D", "loss": "L", "resamples": 5}


@pytest.fixture(scope="module")
def table() -> dict[str, np.ndarray]:
    points = points_of(np.geomspace(1e18, 1e20, 3), sizes=4)
    n, d = np.append(points.parameters, 1e9), np.append(points.tokens, 1e11)
    return {"N": n, "D": d, "L": np.append(points.loss, loss_of(1e9, 1e11))}


def test_modules_of_commands_are_callable():
    for module in (compare, compile_check, fit, ladder, study, genai_jax.train):
        function = getattr(module, module.__name__.rpartition(".")[2])
        assert callable(module) and callable(module.main)
        assert inspect.signature(module) == inspect.signature(function)
        assert getattr(genai_jax, module.__name__.rpartition(".")[2]) is module
        assert module.__name__.rpartition(".")[2] in dir(genai_jax)


def test_a_fit_is_what_the_command_prints(table, tmp_path, capsys):
    file = tmp_path / "runs.csv"
    rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    lines = [",".join(map(str, row.values())) for row in rows]
    file.write_text("\n".join(["N,D,L", *lines]) + "\n")
    law = genai_jax.fit(rows, held_out="flops>2e20", **COLUMNS)
    flags = [f"--csv={file}", f"--output={tmp_path / 'out'}", "--held_out=flops>2e20"]
    fit.main([*flags, *(f"--{name}={value}" for name, value in COLUMNS.items())])
    page = f"report: {tmp_path / 'out' / 'index.html'}"
    assert capsys.readouterr().out == f"{law}\n\n{page}\n".replace("table:", f"{file}:", 1)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert law.page is None and {n: x for n, x in law.numbers.items() if np.isfinite(x)} == {
        n: x for n, x in results["numbers"].items() if x is not None
    }
    # A prediction, and the compute-optimal run, agree with the law that the table follows.
    predicted = law.predict(1e9, 1e11)
    assert predicted.value == pytest.approx(loss_of(1e9, 1e11), rel=1e-3)
    assert predicted.low <= predicted.value <= predicted.high
    best = law.optimum(1e19)
    sizes = np.geomspace(1e7, 1e10, 2000)
    optimum = sizes[np.argmin(loss_of(sizes, 1e19 / (6 * sizes)))]
    assert best.parameters.value == pytest.approx(optimum, rel=0.02)
    # As tables and figures; a table of columns has the same runs.
    held_out = law.tables["held_out"]
    assert type(held_out[0]["N"]) is float and held_out[0]["N"] == 1e9
    assert {"law", "isoflop", "held_out"} <= set(law.figures)
    assert {type(x) for x in law.numbers.values()} == {float, int}
    assert "<th" in held_out._repr_html_() and "held_out" in repr(law)
    of_columns, of_rows = (read_table(t, Columns("N", "D", "L")).points for t in (table, rows))
    assert all(np.array_equal(a, b) for a, b in zip(of_columns, of_rows, strict=True))


def test_a_cell_of_a_table_is_escaped():
    html = Rows([{"<a>": "<b>", "n": 1}, {"n": 2.5, "x": None}])._repr_html_()
    assert "&lt;a&gt;" in html and "&lt;b&gt;" in html and "<b>" not in html


@pytest.mark.parametrize(
    "rows, flags, message",
    [
        ([], {}, "the table has no rows"),
        (3, {}, "the table is a path of a CSV file, a list of dictionaries, or .*, not a int"),
        ([1, 2], {}, "not a list"),
        ({"N": [1, 2], "D": [1]}, {}, "different lengths: N 2, D 1"),
        ([{"N": 1, "D": 2}], {}, "the table has no column 'L'; its columns are N, D"),
        ([{"N": 1, "D": 2, "L": "x"}], {}, "row 0 of the table: L is 'x', not a number"),
        ([{"N": 1, "D": 2, "L": 1}, {"N": 1, "D": 2}], {}, "row 1 of the table: L is ''"),
        ([{"N": -1, "D": 2, "L": 1}], {}, "row 0 of the table: N is -1; it must be positive"),
        ([{"N": 1, "D": 2, "L": 3}], {"loss": "D"}, "name four different columns"),
        ([{"N": 1, "D": 2, "L": 3}], {"lose": "D"}, "--lose is not a flag .*--loss"),
        ([{"N": 1, "D": 2, "L": 3}], {"csv": "x.csv"}, "either a table or csv="),
        ([{"N": 1, "D": 2, "L": 3}], {"resamples": -1}, "--resamples=-1"),
        ([{"N": 1, "D": 2, "L": 3}], {"resamples": {}}, "which no flag can be"),
        ("/nowhere.csv", {}, "cannot read --csv=/nowhere.csv"),
    ],
)
def test_bad_tables_are_one_line(rows, flags, message):
    with pytest.raises(ConfigError, match=message) as error:
        genai_jax.fit(rows, **COLUMNS | flags)
    assert len(str(error.value).splitlines()) == 1


def test_runs_are_compared_as_by_the_command(tmp_path, capsys):
    rows = [{"step": n, "train/loss": 1 / n} for n in (1, 2, 3)]
    two = [run_in(tmp_path / name, {"seed": i}, rows) for i, name in enumerate("ab")]
    report = genai_jax.compare([tmp_path / "a", two[1]])
    compare.main(two)
    assert capsys.readouterr().out == f"{report}\n"
    assert report.tables["flags"] == [{"flag": "--seed", "a": "0", "b": "1"}]
    assert report.numbers == {"a/train/loss": 1 / 3, "b/train/loss": 1 / 3}
    assert list(report.figures) == ["train_loss"] and report.page is None
    written = genai_jax.compare(two, output=tmp_path / "report", metrics=["train/loss"])
    assert written.page.exists() and (tmp_path / "report" / "train_loss.png").exists()
    for workdirs, flags, message in (
        ([], {}, "no runs are named"),
        (two[0], {}, "workdirs is a list of folders"),
        ([tmp_path], {}, "is not the workdir of a run"),
        (two, {"metrics": "eval/x"}, "no run has eval/x"),
        (two, {"over": "time"}, "--over=time"),
    ):
        with pytest.raises(ConfigError, match=message):
            genai_jax.compare(workdirs, **flags)


@pytest.fixture(scope="module")
def base(text_folder) -> dict:
    return {
        "data.dataset": f"text:{text_folder}", "data.batch_size": 8, "data.sequence_length": 32,
        "optimizer.schedule": "linear", "train.progress": False, "checkpoint.every": 0,
        "eval.batches": 1,
    }  # fmt: skip


def test_a_ladder_is_what_the_command_writes(base, tmp_path, capsys):
    options = dict(budgets=[2e8, 4e8], widths=[16, 32], head_dim=8, least_steps=1)
    written = genai_jax.ladder(base, tmp_path / "a", **options)
    (tmp_path / "base.flags").write_text("".join(f"--{k}={v}\n" for k, v in base.items()))
    flags = [f"--{k}={','.join(map(str, v)) if isinstance(v, list) else v}"
             for k, v in options.items()]  # fmt: skip
    ladder.main([f"--flagfile={tmp_path / 'base.flags'}", f"--output={tmp_path / 'b'}", *flags])
    assert capsys.readouterr().out.replace("/b/", "/a/") == f"{written}\n"
    for path in (tmp_path / "b").glob("c*.flags"):
        assert path.read_text() == (tmp_path / "a" / path.name).read_text()
    assert [row["name"] for row in written.runs] == ["c2e8_w16", "c2e8_w32", "c4e8_w16", "c4e8_w32"]
    assert written.why_not_fitted and written.folder == tmp_path / "a"
    for row in written.runs:
        assert abs(row["flops"] / row["budget"] - 1) < 0.5 and row["tokens"] == 256 * row["steps"]
    # The command in its README writes the same ladder again, and so does a base that is a path.
    command = (tmp_path / "a" / "README.md").read_text().split("```")[1].split()
    ladder.main(command[3:])
    assert capsys.readouterr().out == f"{written}\n"
    again = genai_jax.ladder(tmp_path / "base.flags", tmp_path / "c", **options)
    assert again.runs[0]["parameters"] == written.runs[0]["parameters"]
    for flags, options, message in (
        (base, {"widths": 16}, "--budgets is not set"),
        (base, {"budgets": 1e9, "widths": "x"}, "--widths=x is not a list of numbers"),
        (base, {"budgets": 1e9, "width": 16}, "--width is not a flag"),
        (base | {"seeed": 1}, {"budgets": 1e9, "widths": 32}, "--seeed is not a flag"),
        (base | {"transformer.mlp_dim": 1}, {"budgets": 1e9, "widths": 32}, "leave it unset"),
    ):
        with pytest.raises(ConfigError, match=message):
            genai_jax.ladder(flags, tmp_path / "d", **options)


def test_a_study_in_this_process_is_that_of_the_command(base, tmp_path, capsys):
    flags = (*TINY, *(f"--{k}={v}" for k, v in base.items()), "--train.steps=2")
    runs = {"one": ("--seed=1",), "two": ("--seed=2",), "broken": ("--data.dataset=text:/nowhere",)}
    settings = ("--study.analysis=curves", "--study.metrics=eval/loss")
    folder = write_study(tmp_path / "study", flags, runs, *settings)
    with pytest.raises(ConfigError, match=r"no run has finished; broken failed: .*nowhere"):
        only = shutil.copytree(folder, tmp_path / "broken")
        for name in ("one", "two"):
            (only / f"{name}.flags").unlink()
        genai_jax.study(only, tmp_path / "broken" / "work", jobs=0)
    plan = genai_jax.study(folder, tmp_path / "work", dry_run=True, flops_per_second=1e9)
    assert {row["state"] for row in plan.runs} == {"missing"} and plan.runs[0]["seconds"] > 0
    capsys.readouterr()
    report = genai_jax.study(folder, tmp_path / "work", jobs=0)
    out, said = capsys.readouterr()
    assert out == "" and "one: done in" in said
    assert list(report.failed) == ["broken"] and "/nowhere" in report.failed["broken"]
    states = {row["name"]: row["state"] for row in report.runs}
    assert states == {"one": "finished", "two": "finished", "broken": "failed"}
    assert report.page == tmp_path / "work" / "report" / "index.html" and report.page.exists()
    results = json.loads((report.page.parent / "results.json").read_text())
    assert report.numbers == results["numbers"] and report.figures
    assert [row["run"] for row in report.tables["runs"]] == ["one", "two"]
    # The command finds them finished, and reports the same.
    command = [f"--study={folder}", f"--workdir={tmp_path / 'work'}", "--jobs=0", "--only=one,two"]
    assert study.main(command) == 0
    assert capsys.readouterr().out == f"report: {report.page}\n"
    assert json.loads((report.page.parent / "results.json").read_text())["numbers"] == (
        report.numbers
    )
    commands = genai_jax.study(folder, tmp_path / "work", launcher="print").commands
    assert len(commands) == 1 and "--flagfile=" in commands[0]
    for where, options, message in (
        (tmp_path / "none", {}, "no such folder"),
        (folder, {"job": 2}, "--job is not a flag"),
        (folder, {"only": "three"}, "--only=three matches no run"),
        (folder, {"check": True, "dry_run": True}, "--check has an effect only"),
        (folder, {"flags": {"study.metric": "x", "study.analysis": "y"}}, "study.analysis=y"),
    ):
        with pytest.raises(ConfigError, match=message):
            genai_jax.study(where, tmp_path / "work", **options)


def test_a_compile_check_is_that_of_the_command(tmp_path):
    tiny = {"data.batch_size": 8, "data.sequence_length": 32, "transformer.num_layers": 1,
            "transformer.embed_dim": 16, "transformer.num_heads": 2, "mesh.data": 2}  # fmt: skip
    other = tmp_path / "other.flags"
    other.write_text("--data.batch_size=16\n")
    tiny = {name: value for name, value in tiny.items() if name != "data.batch_size"}
    report = genai_jax.compile_check(
        tiny, "v5e:1x2", compiles=False, output=tmp_path / "x.json", assumed_mfu=0.5, compare=other
    )
    assert report == json.loads((tmp_path / "x.json").read_text())
    assert report["mesh"] == {"data": 2} and report["run"]["assumed"]["mfu"] == 0.5
    assert str(report).startswith("command-line flags\nv5e:1x2: 2 devices")
    assert report["batch_size"] == 8 and report.other["batch_size"] == 16 and "ratio" in str(report)
    for flags, topology, options, message in (
        (tiny, "v9:1", {}, "--topology=v9:1 is unknown"),
        (tiny, "v5e:1x2", {"compile": False}, "--compile is not a flag .*--compiles"),
        (tiny | {"mesh.data": 3}, "cpu:2", {"compiles": False}, "^[^\n]*mesh[^\n]*$"),
    ):
        with pytest.raises(ConfigError, match=message):
            genai_jax.compile_check(flags, topology, **options)
