"""The compare command."""

import json

import pytest

from genai_jax import compare
from genai_jax.config import ConfigError
from genai_jax.scaling.run_comparison import short_names


def run_in(folder, flags, rows, **record):
    folder.mkdir(parents=True)
    (folder / "flags.txt").write_text("".join(f"--{n}={v}\n" for n, v in flags.items()))
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture
def two(tmp_path):
    """Two runs, one of them of a population, still going on, and with a name that is odd."""
    curve = lambda end: [{"step": n, "train/loss": end + 1 / n} for n in (1, 2, 3)]
    first = [*curve(1), {"step": 4, "train/loss": 1.0, "eval/loss": 1.25, "eval/images": 8}]
    second = [row | {"train/loss/0": row["train/loss"]} for row in curve(2)]
    return (
        run_in(tmp_path / "a", {"seed": 0, "task": "vae", "vae.beta": 1}, first,
               parameters={"total": 10}, flops_per_step=6, data={}),
        run_in(tmp_path / "$b c$", {"seed": 1, "task": "gan"}, second),
    )  # fmt: skip


def test_flags_and_scores_are_beside_each_other(two, capsys):
    assert compare.main(list(two)) == 0
    printed = capsys.readouterr().out
    assert [line.split() for line in printed.splitlines()[2:6]] == [
        ["flag", "a", "$b", "c$"], ["--seed", "0", "1"], ["--task", "vae", "gan"],
        ["--vae.beta", "1", "-"],
    ]  # fmt: skip
    scores = [line.rsplit(maxsplit=2) for line in printed.split("Scores")[1].splitlines()[3:]]
    assert {name.strip(): values for name, *values in scores} == {
        "steps": ["4", "3"], "parameters": ["10", "-"], "FLOPs per step": ["6", "-"],
        "eval/images": ["8", "-"], "eval/loss": ["1.25", "-"], "train/loss": ["1", "2.333"],
    }  # fmt: skip


def test_curves_are_in_the_report(two, tmp_path, capsys):
    assert compare.main([*two, f"--output={tmp_path / 'report'}"]) == 0
    assert "report/index.html" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "report").glob("*.png")] == ["train_loss.png"]
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert results["numbers"]["a/eval/loss"] == 1.25
    assert compare.main([two[0], "--metrics=eval/loss", "--over=flops",
                         f"--output={tmp_path / 'one'}"]) == 0  # fmt: skip
    assert (tmp_path / "one" / "eval_loss.png").exists()


def test_equal_flags_are_said_to_be_equal(two, tmp_path, capsys):
    again = run_in(tmp_path / "again" / "a", {"seed": 0, "task": "vae", "vae.beta": 1},
                   [{"step": 1, "train/loss": 1.0}])  # fmt: skip
    assert compare.main([two[0], again]) == 0
    assert "All flags are equal." in capsys.readouterr().out


def test_names_are_as_long_as_they_have_to_be(tmp_path):
    assert short_names(["/x/a", "/y/b"]) == ["a", "b"]
    assert short_names(["/x/a/run", "/x/b/run"]) == ["a/run", "b/run"]
    assert short_names(["/run", "/x/run"]) == ["run", "x/run"]


def test_mistakes_are_one_line(two, tmp_path):
    (tmp_path / "file").write_text("")
    for argv, message in (
        ([], "no runs are named"),
        ([two[0], two[0] + "/"], "is given twice"),
        ([str(tmp_path)], "it has no flags.txt"),
        (
            [*two, "--metrics=eval/fid", "--output=x"],
            "no run has eval/fid; the metrics are eval/images, ",
        ),
        ([*two, "--over=flops", "--output=x"], "does not know its FLOPs per step"),
        ([*two, f"--output={tmp_path / 'file'}"], "is a file"),
        ([*two, "--over=flops"], "over=flops has no effect without --output"),
    ):
        with pytest.raises(ConfigError, match=message):
            compare.main(argv)
