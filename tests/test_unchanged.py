"""Tests of an unchanged group are skipped; only a group that passed as a whole is recorded."""

import fnmatch
import json
import re

import pytest

from tests import unchanged
from tests.conftest import ROOT

ARGUMENTS = ("-p", "tests.unchanged", "-p", "no:cacheprovider")
TESTS = """
    import pytest

    @pytest.mark.depends_on("numbers")
    @pytest.mark.parametrize("number", [1, 2])
    def test_number(number):
        assert open("numbers/{}.txt".format(number)).read() == str(number)

    def test_another():
        pass
"""


@pytest.fixture
def project(pytester, monkeypatch):
    """A project whose group of two tests depends on two files, and with a test that always runs."""
    monkeypatch.setattr(unchanged, "ROOT", pytester.path)
    monkeypatch.setattr(unchanged, "RECORD", pytester.path / "unchanged.json")
    monkeypatch.setattr(unchanged, "GROUPS", {"numbers": unchanged.Group(("numbers/*.txt",))})
    pytester.mkdir("numbers")
    for number in ("1", "2"):
        (pytester.path / "numbers" / f"{number}.txt").write_text(number)
    pytester.makeini("[pytest]\ntestpaths = tests")
    pytester.mkdir("tests").joinpath("test_numbers.py").write_text(
        "\n".join(line.removeprefix("    ") for line in TESTS.splitlines())
    )
    return pytester


def run(project, *arguments, **outcomes):
    result = project.runpytest_inprocess(*ARGUMENTS, *arguments)
    result.assert_outcomes(**outcomes)
    return result


def test_whole_runs_depend_on_what_their_tests_import_and_start():
    pattern = "|".join(fnmatch.translate(p) for p in unchanged.GROUPS["whole runs"].files)
    tracked = [p.relative_to(ROOT).as_posix() for p in (ROOT / "tests").rglob("*.py")]
    files = [name for name in tracked if re.match(pattern, name)]
    assert len(files) > 25
    missing = set()
    for name in files:
        text = (ROOT / name).read_text(encoding="utf-8")
        modules = re.findall(r"^(?:from|import) ((?:tests|benchmarks|colabs)[\w.]*)", text, re.M)
        modules += re.findall(r"^from tests import (\w+)", text, re.M)
        needed = {f"{module.replace('.', '/')}.py" for module in modules}
        needed |= {f"tests/{script}" for script in re.findall(r'report_of\("([\w/]+\.py)"', text)}
        exist = {path for path in needed if (ROOT / path).is_file()}
        missing |= {f"{name} -> {path}" for path in exist if not re.match(pattern, path)}
    assert not missing


def test_a_recorded_group_runs_again_when_a_file_or_a_version_changes(project, monkeypatch):
    run(project, passed=3)
    assert not unchanged.RECORD.exists() and unchanged.main() == 1
    run(project, "--record", passed=3)
    assert unchanged.main() == 0
    result = run(project, "-rs", passed=1, skipped=2)
    files = unchanged.read()["numbers"]["files"]
    result.stdout.fnmatch_lines(f"*'numbers' passed with files {files}; `make test_all` runs it")

    with monkeypatch.context() as patch:
        patch.setattr(unchanged, "version", lambda name: "1000")
        run(project, passed=3)
        run(project, "--record", passed=3)
        run(project, passed=1, skipped=2)
    run(project, passed=1, skipped=2)  # what passed with the other version still counts

    (project.path / "numbers" / "3.txt").write_text("3")
    run(project, passed=3)
    run(project, "--record", passed=3)
    recorded = json.loads(unchanged.RECORD.read_text())["numbers"]
    assert recorded["files"] != files and len(recorded["passed_with"]) == 1


def test_a_group_that_did_not_pass_as_a_whole_is_not_recorded(project):
    result = run(project, "--record", "-k", "1", passed=1, deselected=2)
    result.stdout.fnmatch_lines("'numbers' (*): not recorded: 1 of 2 tests passed")
    (project.path / "numbers" / "2.txt").write_text("two")
    run(project, "--record", passed=2, failed=1)
    assert not unchanged.RECORD.exists()


def test_recording_needs_all_tests(project):
    result = project.runpytest_inprocess(*ARGUMENTS, "--record", "tests/test_numbers.py")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines("*--record needs every test of a group: give no path beside it")


def test_every_group_has_files_and_a_pattern_without_any_is_an_error(monkeypatch):
    assert all(unchanged.files_hash(group) for group in unchanged.GROUPS)
    monkeypatch.setitem(unchanged.GROUPS, "none", unchanged.Group(("no/such/*.py",)))
    with pytest.raises(ValueError, match=r"no file matches 'no/such/\*\.py' of 'none'"):
        unchanged.files_hash("none")
