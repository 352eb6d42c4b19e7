"""Runs that go on with another learning rate or with other data."""

import json

import pytest

from genai_jax import train
from genai_jax.config import ConfigError
from tests.commands import TINY

FLAGS = (
    *TINY, "--train.log_every=1", "--eval.batches=1", "--checkpoint.every=2",
    "--optimizer.schedule=constant", "--transformer.num_layers=1",
)  # fmt: skip


def rows(workdir) -> dict[int, dict]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    values = {row["step"]: row for row in map(json.loads, lines)}
    return {
        step: {n: v for n, v in row.items() if not n.startswith("perf/")}
        for step, row in values.items()
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two texts."""
    paths = []
    for name, word in (("one", "tick"), ("two", "tock")):
        paths.append(tmp_path_factory.mktemp(name))
        for i in range(6):
            (paths[-1] / f"{i}.txt").write_text(f"{word} {i} " * 40)
    return paths


def go(workdir, folder, *flags) -> int:
    return train.main([*FLAGS, f"--data.dataset=text:{folder}", f"--workdir={workdir}", *flags])


def test_a_run_goes_on_with_what_is_asked_for(folders, tmp_path, capsys):
    one, two = folders
    begun, whole, parts = (tmp_path / name for name in ("begun", "whole", "parts"))
    assert go(begun, one, "--train.steps=2") == 0
    with pytest.raises(ConfigError, match=r"-> 0.5; use the same flags, another workdir, or --res"):
        go(begun, one, "--train.steps=4", "--optimizer.learning_rate=0.5")
    with pytest.raises(ConfigError, match=r"--seed=0 -> 1; use the same flags or another workdir"):
        go(begun, one, "--train.steps=4", "--seed=1")
    changed = ("--resume_with_changes", "--optimizer.learning_rate=0.002")
    with pytest.raises(ConfigError, match=r"different flags: --ema.decay= -> 0.9; use the same"):
        go(begun, one, *changed, "--ema.decay=0.9", "--train.steps=4")
    for workdir, ends in ((whole, [6]), (parts, [4, 6])):
        begun_files = [p for p in begun.rglob("*") if p.is_file()]
        for path in begun_files:
            target = workdir / path.relative_to(begun)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
        capsys.readouterr()
        for end in ends:
            assert go(workdir, two, *changed, f"--train.steps={end}") == 0
        said = capsys.readouterr().err
        assert "changed since the run began: --optimizer.learning_rate=0.001 -> 0.002" in said
        assert said.count("the data have changed, and start from their beginning") == 1
        (change,) = json.loads((workdir / "run.json").read_text())["changes"]
        assert change["step"] == 2 and len(change["flags"]) == 2
    rates = [row["train/learning_rate"] for row in rows(whole).values()]
    assert rates == [1e-3, 1e-3, 2e-3, 2e-3, 2e-3, 2e-3]
    both = [{n: rows(w)[n] for n in (1, 2, 3, 5, 6)} for w in (whole, parts)]  # 4: evaluated in one
    assert both[0] == both[1]


def test_data_that_do_not_fit_are_refused(folders, tmp_path):
    assert go(tmp_path, folders[0], "--train.steps=1") == 0
    with pytest.raises(ConfigError, match="tokenizer"):
        go(tmp_path, folders[0], "--train.steps=2", "--data.tokenizer=numbers:10",
           "--resume_with_changes")  # fmt: skip


def test_data_that_changed_under_the_same_name_are_recorded(tmp_path, capsys):
    data, run = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    for i in range(6):
        (data / f"{i}.txt").write_text(f"tick {i} " * 40)
    assert go(run, data, "--train.steps=1") == 0
    (data / "6.txt").write_text("tock " * 40)
    with pytest.raises(ConfigError, match=r"the data changed .*--resume_with_changes goes on"):
        go(run, data, "--train.steps=2")
    capsys.readouterr()
    assert go(run, data, "--train.steps=2", "--resume_with_changes") == 0
    assert "changed since the run began: train_documents: 5 -> 6" in capsys.readouterr().err
    (change,) = json.loads((run / "run.json").read_text())["changes"]
    assert change["step"] == 1 and "train_documents: 5 -> 6" in change["data"]
