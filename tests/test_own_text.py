"""A user's own text, from training to scores on other text: the guide, command by command."""

import importlib
import json
import re
import shlex

import pytest

from genai_jax import evaluate, train
from genai_jax.config import ConfigError
from tests.commands import TINY
from tests.conftest import ROOT
from tests.data.text.formats import write_documents

GUIDE = ROOT / "docs" / "your_own_text.md"
SMALL = (*TINY, "--train.steps=1", "--eval.batches=0", "--transformer.num_layers=1")
MAIL = [f"Dear friend {i}, the weather is fine. ☀" for i in range(10)]


def commands_of(text: str) -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.strip().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, text_folder):
    folder = tmp_path_factory.mktemp("own")
    (folder / "books").symlink_to(text_folder)
    (folder / "experiments").symlink_to(ROOT / "experiments")
    write_documents(folder / "mail.jsonl", MAIL, "body")
    return folder


@pytest.fixture(scope="module")
def run(folder):
    """The workdir of a run on half of what `other` has."""
    half = ("one", "two", "three", "four")
    write_documents(folder / "half.csv", half)
    write_documents(folder / "other.csv.gz", ("five", "six", "seven"))
    train.main([*SMALL, f"--data.dataset=text:{folder}/half.csv", f"--workdir={folder}/run"])
    return f"--workdir={folder}/run"


def score(capsys, *flags: str) -> tuple[dict, str]:
    capsys.readouterr()
    assert evaluate.main(flags) == 0
    said = capsys.readouterr()
    return json.loads(said.out), said.err


def test_the_commands_of_the_guide(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    results = []
    for python, dash, module, *flags in commands_of(GUIDE.read_text(encoding="utf-8")):
        assert (python, dash) == ("python", "-m")
        few = {
            "genai_jax.train": SMALL, "genai_jax.sample": ("--max_tokens=3",),
            "genai_jax.train_tokenizer": ("--vocab_size=300",),
            "genai_jax.evaluate": (),
        }[module]  # fmt: skip
        assert importlib.import_module(module).main([*flags, *few]) == 0
        said = capsys.readouterr()
        if module == "genai_jax.evaluate":
            results.append((json.loads(said.out), said.err))
        if module == "genai_jax.train" and "books_bpe" not in flags[-1]:
            assert "text:books: 40 files, 40 documents, " in said.err
    (own, own_note), (mail, mail_note), (part, part_note) = results
    assert own["dataset"] == "text:books" and "trained_on" not in own and "note" not in own_note
    assert (mail["dataset"], mail["trained_on"]) == ("text:mail.jsonl", "text:books")
    assert mail["bytes"] == sum(len(text.encode()) for text in MAIL)
    assert "which was trained on text:books" in mail_note
    assert 0 < part["bytes"] < mail["bytes"] and "these are 1 of 10 documents" in part_note


def test_scores_of_other_text_are_exact(run, folder, capsys):
    other = f"--data.dataset=text:{folder}/other.csv.gz"
    whole, note = score(capsys, run, other, "--data.validation_percent=100")
    assert whole["bytes"] == 12 and "of 3 documents" not in note
    assert whole["tokens"] == 12 + 3  # and the end of each
    part, note = score(capsys, run, other)
    assert part["bytes"] < 12 and "these are 1 of 3 documents" in note
    nats = whole["loss"] * whole["tokens"]
    assert whole["bits_per_byte"] == pytest.approx(nats / 0.6931471805599453 / 12, rel=1e-5)
    single = folder / "single.md"
    single.write_text("seven")
    other = f"--data.dataset=text:{single}"
    assert score(capsys, run, other, "--data.validation_percent=100")[0]["bytes"] == 5
    with pytest.raises(ConfigError, match=r"one document.*; --data\.validation_percent=100 scores"):
        evaluate.main([run, other])


def test_what_was_trained_on_is_never_scored(run, folder):
    write_documents(folder / "copy.jsonl", ("four", "three", "two", "one"))
    for flags in ((), (f"--data.dataset=text:{folder}/half.csv",)):
        with pytest.raises(ConfigError, match=r"percent=100: the run was trained on documents of"):
            evaluate.main([run, *flags, "--data.validation_percent=100"])


def test_flags_that_the_other_text_does_not_use_are_not_inherited(folder, tmp_path, capsys):
    write_documents(tmp_path / "a.jsonl", ("one", "two", "three"), "body")
    flags = (f"--data.dataset=text:{tmp_path}/a.jsonl", "--data.text_key=body")
    train.main([*SMALL, *flags, f"--workdir={tmp_path}/run"])
    run = f"--workdir={tmp_path}/run"
    (tmp_path / "a.txt").write_text("alpha\fbeta")
    result, _ = score(capsys, run, f"--data.dataset=text:{tmp_path}/a.txt")
    assert result["bytes"] in (4, 5)
    with pytest.raises(ConfigError, match=r"--data\.text_key=x applies only to TFDS"):
        evaluate.main([run, f"--data.dataset=text:{tmp_path}/a.txt", "--data.text_key=x"])
    write_documents(tmp_path / "b.csv", ("four", "five"), "words")
    with pytest.raises(ConfigError, match=r"text_key=body is missing in .*'words'"):
        evaluate.main([run, f"--data.dataset=text:{tmp_path}/b.csv"])
    other = (f"--data.dataset=text:{tmp_path}/b.csv", "--data.text_key=words")
    assert score(capsys, run, *other)[0]["bytes"] == 4


def test_a_run_on_a_single_document_can_be_used(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("only this")
    run = f"--workdir={tmp_path}/run"
    train.main([*SMALL, f"--data.dataset=text:{tmp_path}/a.txt", run])
    (tmp_path / "b.txt").write_text("that")
    other = (f"--data.dataset=text:{tmp_path}/b.txt", "--data.validation_percent=100")
    result, said = score(capsys, run, *other)
    assert result["bytes"] == 4 and "run.json" not in said
