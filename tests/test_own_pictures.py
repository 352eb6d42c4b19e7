"""Runs on a user's own pictures: the guide's commands, and pictures that moved or changed."""

import contextlib
import json
import pathlib
import re
import shlex

import pytest
from PIL import Image

from genai_jax import evaluate, sample, train
from genai_jax.config import ConfigError
from tests.conftest import ROOT
from tests.data.images.picture_files import COLORS, encoded, tile, write_tiles

GUIDE = (ROOT / "docs" / "your_own_pictures.md").read_text(encoding="utf-8")
COMMANDS = {"train": train, "sample": sample, "evaluate": evaluate}
# What the guide's flagfiles train in minutes, in seconds.
SMALL = {
    "flow": ("--dit.num_layers=1", "--dit.embed_dim=16", "--dit.num_heads=2", "--dit.patch_size=8",
             "--dit.text_layers=1", "--dit.scan_layers=true", "--sampler.steps=2"),
    "classifier": ("--classifier.channels=4", "--classifier.num_stages=1"),
}  # fmt: skip
SHORT = ("--train.steps=2", "--train.progress=false", "--data.batch_size=8", "--eval.batches=1")


def arguments_of(command: str) -> tuple[str, list[str]]:
    """The module of a command, and its flags with those that make it short."""
    python, module, name, *flags = shlex.split(command)
    assert (python, module) == ("python", "-m")
    kind = re.search(r"quickstart/(\w+)\.flags", command)
    small = (*SMALL[kind[1]], *SHORT) if kind else ()
    return name.removeprefix("genai_jax."), [*flags, *small]


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """Where the guide's commands ran, on tiles with captions."""
    folder = tmp_path
    write_tiles(folder / "tiles", 12)
    lines = [f'{name}/{i:03}.png,"{name}, {i}"' for name in COLORS for i in range(12)]
    (folder / "tiles" / "metadata.csv").write_text("\n".join(["file_name,text", *lines]) + "\n")
    (folder / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    with contextlib.chdir(folder):
        for command in commands():
            name, flags = arguments_of(command)
            with contextlib.redirect_stdout((folder / f"{name}.out").open("a")):
                assert COMMANDS[name].main(flags) == 0, command
        yield folder
    monkeypatch.undo()


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", GUIDE, re.DOTALL)
    return [line for block in blocks for line in block.strip().splitlines()]


def check_what_the_commands_left(folder):
    assert len(commands()) == 7
    written = (folder / "sample.out").read_text().splitlines()
    assert len(written) == 3 and all(Image.open(folder / path).width > 60 for path in written)
    scores = json.loads((folder / "evaluate.out").read_text())
    assert {"fd_classifier", "agreement", "loss"} <= scores.keys()
    record = json.loads((folder / "runs" / "tiles" / "run.json").read_text())["data"]
    assert record["label_names"] == [["brick", "grass", "water"]]
    assert [record[f"{s}_examples"] for s in ("train", "validation")] == [29, 7]
    flags = (folder / "runs" / "tiles" / "flags.txt").read_text()
    assert "--data.dataset=images:tiles\n" in flags


def test_the_note_of_the_guide_is_what_is_said(tmp_path, capsys):
    write_tiles(tmp_path / "again", 2)
    with contextlib.chdir(tmp_path):
        from tests.data.images.picture_files import loader

        loader("images:again", validation_percent=34)
    (shown,) = re.findall(r"^note: .*$", GUIDE, re.MULTILINE)
    said = capsys.readouterr().err.strip()
    pattern = lambda text: re.sub(r"\d[\d,]*", "N", re.sub(r"\(brick.*?\)", "()", text))
    assert pattern(said) == pattern(shown).replace("images:tiles", "images:again")


def test_the_commands_of_the_guide_and_pictures_that_moved_or_changed(folder, capsys):
    check_what_the_commands_left(folder)
    workdir = f"--workdir={folder / 'runs' / 'tiles'}"
    assert evaluate.main([workdir]) == 0
    before = json.loads(capsys.readouterr().out)
    (folder / "tiles").rename(folder / "elsewhere")
    assert evaluate.main([workdir]) == 0  # of the copy in the workdir
    assert json.loads(capsys.readouterr().out) == before
    kept = folder / "runs" / "tiles" / "data" / "record.json"
    kept.rename(kept.with_suffix(".away"))
    for command in (sample, evaluate):
        with pytest.raises(ConfigError, match=r"no such folder .*--data\.dataset=ITS_NEW_PLACE"):
            command.main([workdir])
    kept.with_suffix(".away").rename(kept)
    moved = f"--data.dataset=images:{folder / 'elsewhere'}"
    assert evaluate.main([workdir, moved]) == 0
    out, err = capsys.readouterr()
    now = json.loads(out)
    assert now | {"dataset": before["dataset"]} == before and "not those of the run" not in err
    assert sample.main([workdir, moved, "--label=water", "--num_samples=1"]) == 0
    with pytest.raises(ConfigError, match=r"--label=sea is not one of brick, grass, water"):
        sample.main([workdir, moved, "--label=sea"])
    for i in range(12):
        path = folder / "elsewhere" / "grass" / f"{i:03}.png"
        path.write_bytes(encoded(tile("grass", 100 + i)))
    capsys.readouterr()
    assert evaluate.main([workdir, moved]) == 0
    assert "the held-out data are not those of the run" in capsys.readouterr().err
    (folder / "elsewhere" / "metadata.csv").unlink()
    (folder / "elsewhere" / "grass").rename(folder / "elsewhere" / "meadow")
    with pytest.raises(ConfigError, match=r"has label_names .*meadow.* was trained with .*grass"):
        sample.main([workdir, moved])
    (folder / "elsewhere").rename(folder / "tiles")
    with contextlib.chdir(folder), pytest.raises(ConfigError, match="the data changed since"):
        train.main([*arguments_of(commands()[0])[1], "--train.steps=3"])
