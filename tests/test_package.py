"""What is installed, and what it says of itself."""

import pathlib
import re
import subprocess
import sys
import tarfile
import zipfile

import pytest
import yaml

import genai_jax
from genai_jax.errors import ConfigError
from genai_jax.flagfiles import expand_flagfiles
from genai_jax.shipped import shipped
from tests.commands import TINY, environment
from tests.conftest import ROOT

QUICKSTART = "experiments/quickstart/transformer.flags"


def test_one_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    number, day = re.search(r"^## \[(\S+)\] - (\S+)$", changelog, re.MULTILINE).groups()
    assert number == str(citation["version"]) == genai_jax.__version__
    assert day == str(citation["date-released"])
    required = {"cff-version", "message", "title", "authors", "type", "license"}
    assert required <= citation.keys() and citation["cff-version"] == "1.2.0"


def test_experiments_are_those_of_the_installation_unless_there_are_some_here(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert shipped(QUICKSTART) == str(ROOT / QUICKSTART)
    assert expand_flagfiles([f"--flagfile={QUICKSTART}"])
    for other in ("experiments/none.flags", "experiments/../setup.py", f"x/{QUICKSTART}", "", "\0"):
        assert shipped(other) == other
    with pytest.raises(ConfigError, match=r"cannot read flagfile 'experiments/none\.flags'"):
        expand_flagfiles(["--flagfile=experiments/none.flags"])
    pathlib.Path(QUICKSTART).parent.mkdir(parents=True)
    pathlib.Path(QUICKSTART).write_text("--seed=7\n")
    assert expand_flagfiles([f"--flagfile={QUICKSTART}"]) == ["--seed=7"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of a wheel and an sdist, as `python -m build` makes them."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    source = tmp_path_factory.mktemp("source") / "genai_jax"
    files = ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    tracked = subprocess.run(files, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-2000:]
    return folder


def test_the_sdist_has_everything(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in ("Makefile", "CITATION.cff", QUICKSTART, "tests/commands.py", "docs/python.md"):
        assert name in names
    assert not any("__pycache__" in name or name.startswith(".venv") for name in names)


def test_the_wheel_runs_the_quickstart_outside_of_the_clone(built, tmp_path):
    (path,) = built.glob("*.whl")
    site, folder = tmp_path / "site", tmp_path / "empty"
    folder.mkdir()
    with zipfile.ZipFile(path) as wheel:  # what pip does with a wheel of pure Python
        assert not any(name.startswith(("tests/", "experiments/")) for name in wheel.namelist())
        wheel.extractall(site)
    run = lambda module, *flags: subprocess.run(
        [sys.executable, "-m", f"genai_jax.{module}", "--workdir=runs/quickstart", *flags],
        cwd=folder, env=environment() | {"PYTHONPATH": str(site)}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    tiny = ["--train.steps=2", "--eval.batches=1", *TINY]
    trained = run("train", f"--flagfile={QUICKSTART}", *tiny)
    assert trained.returncode == 0, trained.stderr
    sampled = run("sample", "--prompt=The ", "--max_tokens=5")
    assert sampled.returncode == 0 and sampled.stdout.startswith("The ")
    assert (
        f'"genai_jax": "{genai_jax.__version__}"'
        in (folder / "runs" / "quickstart" / "run.json").read_text()
    )
