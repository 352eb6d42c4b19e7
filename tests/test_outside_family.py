"""A family that lives outside the project: the guide, word for word, and what is refused."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from genai_jax import evaluate, outside, sample
from genai_jax.components import parse_run, read_config
from genai_jax.config import ConfigError
from genai_jax.tasks.registry import TASKS, task_class, task_name
from tests.commands import environment
from tests.conftest import ROOT

GUIDE = ROOT / "docs" / "your_own_family.md"
TASK = "--task=my_family.coin:Coin"


def files_of(text: str) -> dict[str, str]:
    """Path -> content of the files that a guide shows."""
    pattern = r"\*\*`([^`]+)`\*\*[^\n]*(?:\n[^\n`*][^\n]*)*\n\n```\w*\n(.*?)```"
    return dict(re.findall(pattern, text, re.DOTALL))


def commands_of(text: str) -> list[str]:
    (block,) = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return block.strip().splitlines()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """The files of the guide, and what its commands printed."""
    folder = tmp_path_factory.mktemp("outside")
    text = GUIDE.read_text(encoding="utf-8")
    for name, content in files_of(text).items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content, encoding="utf-8")
    for i, command in enumerate(commands_of(text)):
        (folder / f"output_{i}").write_text(run(folder, *shlex.split(command)[1:]))
    return folder


def run(folder: pathlib.Path, *arguments: str, code: int = 0) -> str:
    """`python arguments` in the folder, with genai_jax installed as a user has it."""
    result = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment(), capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout + result.stderr


def test_the_guide_is_a_whole_family_in_under_120_lines(folder):
    files = files_of(GUIDE.read_text(encoding="utf-8"))
    assert set(files) == {"my_family/coin.py", "coin.flags", "test_coin.py"}
    lines = [line for content in files.values() for line in content.splitlines() if line.strip()]
    assert len(lines) < 120
    assert '"loss": 0.3' in (folder / "output_1").read_text()
    sides = (folder / "output_2").read_text().strip()
    assert len(sides) == 40 and set(sides) <= {"H", "T"}
    assert "1 passed" in (folder / "output_3").read_text()


def test_a_workdir_alone_never_decides_which_code_is_run(folder, monkeypatch):
    monkeypatch.setattr(outside, "_allowed", set())
    workdir = f"--workdir={folder / 'run'}"
    for command in (sample, evaluate):
        for flags in ((workdir,), (workdir, "--task=x:Y")):
            with pytest.raises(ConfigError, match="outside genai_jax") as error:
                command.main(flags)
            assert "\n" not in str(error.value) and TASK in str(error.value)
    assert "my_family" not in sys.modules
    said = run(folder, "-m", "genai_jax.sample", "--workdir=run", code=2)
    assert said.count("\n") == 1 and said.startswith("error: --workdir=run")


def test_a_study_of_an_outside_family(folder):
    study = folder / "study"
    study.mkdir()
    (study / "README.md").write_text("# Coins\n\nDoes the rate matter?\n")
    (study / "base.flags").write_text(f"{TASK}\n--train.steps=4\n--train.progress=false\n")
    (study / "study.flags").write_text("--study.analysis=curves\n")
    for rate in (0.1, 0.2):
        flags = f"--flagfile=base.flags\n--optimizer.learning_rate={rate}\n"
        (study / f"rate.{rate}.flags").write_text(flags)
    run(folder, "-m", "genai_jax.study", "--study=study", "--workdir=studied")
    assert (folder / "studied" / "report" / "index.html").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("poetry", "not one of language_model, .*my_package.my_module:MyTask"),
        ("no_such_package.module:Task", "cannot import no_such_package.module: ModuleNotFound"),
        ("tests.outside_tasks:Missing", "has no Missing"),
        ("tests.outside_tasks:Incomplete", "lacks phases, example_metrics, which every task has"),
        ("tests.outside_tasks_broken:Task", "cannot import .*: ZeroDivisionError: division by"),
    ],
)
def test_an_unknown_or_unfit_task_is_one_line(name, said):
    with pytest.raises(ConfigError, match=said) as error:
        parse_run([f"--task={name}"])
    assert "\n" not in str(error.value)


def test_names_and_classes_belong_together():
    for name in TASKS:
        assert task_name(task_class(name)) == name


def test_a_mixer_from_outside_is_named_too(tmp_path, monkeypatch):
    mixer = "tests.networks.sequence.recurrence:LinearRecurrence"
    config = parse_run([f"--transformer.pattern={mixer}"])
    (tmp_path / "flags.txt").write_text(config.to_flags())
    monkeypatch.setattr(outside, "_allowed", set())
    with pytest.raises(ConfigError, match=f"--code={mixer}"):
        read_config(str(tmp_path))
    outside.allow([mixer])
    assert read_config(str(tmp_path)).transformer == config.transformer
    assert os.listdir(tmp_path) == ["flags.txt"]
