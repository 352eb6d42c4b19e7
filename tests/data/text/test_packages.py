"""Docstrings and source of installed packages."""

import json
import os
import re
import subprocess
import sys

import pytest

from genai_jax.data.text import packages, stdlib
from genai_jax.data.text.loader import DataConfig
from genai_jax.data.text.sources import _embedded, open_source
from tests.conftest import ROOT


@pytest.fixture
def two(monkeypatch, tmp_path):
    """Two packages in a folder, the second of which would fail if it were imported."""
    files = {
        "one/__init__.py": '"""The first."""\n\ndef f():\n    """Does it."""\n',
        "one/_private.py": 'class A:\n    """Of a class."""\n\n    def g(self):\n        pass\n',
        "one/tests/test_f.py": '"""A test."""\n',
        "one/f_test.py": '"""A test."""\n',
        "one/data_pb2.py": '"""Generated."""\n',
        "two/__init__.py": 'raise RuntimeError("imported")\n',
        "two/sub/m.py": '"""Deeper: \\ud800."""\n',
        "two/template.py": "def {{name}}(:\n",
    }
    for name, text in files.items():
        path = tmp_path / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(packages, "PACKAGES", {"one": "one", "two": "two", "absent-x": "absent_x"})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _embedded.cache_clear()
    yield tmp_path
    _embedded.cache_clear()


EXPECTED = [
    "one\n---\nThe first.\n\none.f\n-----\nDoes it.\n",
    "one._private.A\n--------------\nOf a class.\n",
    "two.sub.m\n---------\nDeeper: \\ud800.\n",
]


def test_docstrings_and_source_of_packages_without_their_tests(two, capsys):
    assert packages.docs() == EXPECTED
    said = capsys.readouterr().err
    assert "parsing the installed packages" in said and "3 modules, " in said
    source = packages.source()
    assert len(source) == 5 and not any("test" in text or "Generated" in text for text in source)
    assert "two" not in sys.modules and "one" not in sys.modules
    splits = [open_source(DataConfig(dataset="package_docs"), s) for s in ("train", "validation")]
    assert sorted(s[i] for s in splits for i in range(len(s))) == sorted(EXPECTED)


def test_the_cache_is_used_until_a_file_changes_and_only_if_it_is_intact(two, capsys):
    def parsed() -> bool:
        documents = packages.docs()
        assert documents[1:] == EXPECTED[1:]
        return "parsing" in capsys.readouterr().err

    folder = two / "cache" / "genai_jax" / "package_docs"
    assert [parsed(), parsed()] == [True, False]
    (first,) = folder.iterdir()
    for version in "ABCDE":
        (two / "site" / "one" / "__init__.py").write_text(f'"""Version {version}."""\n')
        os.utime(two / "site" / "one" / "__init__.py", ns=(0, ord(version)))
        assert [parsed(), parsed()] == [True, False]
    assert len(list(folder.iterdir())) == 4 and not first.exists()
    kept = max(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    whole = json.loads(kept.read_text())
    for damaged in (
        "", "[]", "{", '{"key": 1}', json.dumps(whole | {"documents": ["other"]}),
        json.dumps(whole | {"documents": [1]}), "[" * 10**5,
    ):  # fmt: skip
        kept.write_text(damaged)
        assert [parsed(), parsed()] == [True, False], damaged
    kept.unlink()
    os.mkfifo(kept)
    assert [parsed(), parsed()] == [True, False]


def test_a_cache_that_cannot_be_written_has_no_effect(two, monkeypatch):
    (two / "cache").write_text("a file")
    assert [packages.docs(), packages.docs()] == [EXPECTED] * 2
    monkeypatch.delenv("XDG_CACHE_HOME")

    def nobody(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.expanduser", nobody)
    assert packages.docs() == EXPECTED


def test_the_documentation_of_python_is_parsed_once(two, monkeypatch):
    parsed, plain = [], stdlib.docstrings
    monkeypatch.setattr(stdlib, "docstrings", lambda *x: parsed.append(x[0]) or plain(*x))
    monkeypatch.setattr(stdlib.sysconfig, "get_path", lambda name: str(two / "lib"))
    (two / "lib").mkdir()
    for text in ("First.", "First.", "Another."):
        (two / "lib" / "module.py").write_text(f'"""{text}"""\n')
        os.utime(two / "lib" / "module.py", ns=(0, 0))
        assert stdlib.docs()[-1] == f"module\n------\n{text}\n"
    assert parsed == ["module"] * 2


def test_the_fingerprint_tells_versions_apart(two):
    def fingerprint() -> str:
        _embedded.cache_clear()
        return open_source(DataConfig(dataset="package_source"), "train").fingerprint()

    before = fingerprint()
    assert before == fingerprint()
    (two / "site" / "one" / "__init__.py").write_text('"""A new version."""\n')
    assert before != fingerprint()


def test_the_packages_are_those_that_setup_requires():
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    required = setup[setup.index("install_requires") : setup.index("extras_require")]
    later = {"pyyaml"}  # required since; the text stays what runs were trained on
    assert set(packages.PACKAGES) == set(re.findall(r'"([\w-]+)>=', required)) - later


def test_finding_the_real_packages_imports_none_of_them():
    code = (
        "import sys; from genai_jax.data.text import packages as p; files = [*p._files()];"
        "print(len(files), [x for x in p.PACKAGES.values() if x in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    count, _, imported = out.strip().partition(" ")
    assert int(count) > 1000 and imported in ("[]", "['absl']")
