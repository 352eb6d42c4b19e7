"""README.md and docs/: every block is executed, every flag and file that they name is there."""

import pathlib
import re

import matplotlib
import pytest

from genai_jax.tasks.registry import TASKS
from tests.conftest import ROOT
from tests.docs_blocks import (
    BESIDE,
    ELSEWHERE,
    PAGES,
    all_flags,
    blocks_of,
    check_names,
    commands_of,
    execute,
)

KINDS = {"bash", "python", "flags", "text", ""}
HERE = [p for p in PAGES if p not in ELSEWHERE and any(b.kind for b in blocks_of(p))]
# Flags of other programs, and placeholders.
OTHERS = {"name", "flag", "component.field", "grace", "action", "zone", "cluster", "image", "nodes",
          "processes", "dry_run", "target", "output", "component", "calls", "measure"}  # fmt: skip

NUMBER = re.compile(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?")


@pytest.mark.parametrize("page", HERE)
def test_every_block_runs(page, tmp_path, monkeypatch):
    matplotlib.use("Agg")
    monkeypatch.setattr("genai_jax.outside._allowed", set())
    execute(page, tmp_path)


@pytest.mark.parametrize("page", PAGES)
def test_blocks_say_what_they_are(page):
    for block in blocks_of(page):
        assert block.kind in KINDS, f"{block}: ```{block.kind}"
        if block.kind in ("text", ""):
            lines = [x for x in block.text.splitlines() if re.match(r"(\$ )?(python|pip|make) ", x)]
            assert not lines, f"{block}: commands that no test runs"
        if block.not_run:
            assert len(block.not_run.split()) > 3, f"{block}: say why"
    if page in ELSEWHERE:
        assert pathlib.Path(page).name in (ROOT / ELSEWHERE[page]).read_text(encoding="utf-8")
        assert not any(block.not_run for block in blocks_of(page))


def test_nearly_all_commands_are_executed():
    blocks = [b for page in PAGES for b in blocks_of(page) if b.kind in ("bash", "python")]
    sizes = {block: len(commands_of(block)) if block.kind == "bash" else 1 for block in blocks}
    marked = sum(size for block, size in sizes.items() if block.not_run)
    assert len(blocks) > 40 and marked / sum(sizes.values()) < 0.2


def test_flags_and_files_that_pages_name_are_there():
    known, odd = all_flags() | OTHERS, []
    for page in (*PAGES, *BESIDE):
        text = (ROOT / page).read_text(encoding="utf-8")
        for code in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
            # of other programs: --extra-index-url
            for name in re.findall(r"(?<![\w-])--([a-z][a-z0-9_.]*[a-z0-9])(?![\w-])", code):
                if name not in known and f"{name}.*" not in code:
                    odd.append(f"{page}: --{name}")
        for link in re.findall(r"\]\(([^)\s#]+)", text):
            if not re.match(r"[a-z]+:", link) and not (ROOT / page).parent.joinpath(link).exists():
                odd.append(f"{page}: {link}")
        for path in re.findall(r"`(?:experiments/)?([\w/]+\.flags)`", text):
            folders = (p.parent for p in (ROOT / "experiments").glob("**/*.flags"))
            places = (ROOT, ROOT / "experiments", *folders)
            if "NAME" in path or f"**`{path}`**" in text:
                continue
            if not any((place / path).exists() for place in places):
                odd.append(f"{page}: {path}")
    assert odd == []


@pytest.mark.parametrize("page", BESIDE)
def test_commands_of_other_pages_have_the_flags_that_they_name(page):
    for block in blocks_of(page):
        if any(line.startswith("python -m") for line in commands_of(block)):
            check_names(block)


def test_the_readme_is_short_and_complete():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 200
    for task in TASKS:
        assert f"`{task}`" in readme
    pages = {page for page in PAGES if page.startswith("docs/families/")}
    assert len(pages) == len(TASKS) + 1  # flow matching is the task diffusion
    for page in pages:
        assert page in readme, page
        text = (ROOT / page).read_text(encoding="utf-8")
        for part in ("| papers | [", ".flags`](", "| measured |", "![", "**Limits.**", "```bash"):
            assert part in text, f"{page} has no {part}"


def test_the_figures_of_the_readme_are_those_of_the_pages():
    """Each number of its table is on the family's page and beside the flagfile, also rounded."""
    row = r"\| \[[^]]+\]\((docs/families/\S+)\) \| `\w+` \| `(\S+\.flags)` \| (.*) \| (.*) \|"
    rows = re.findall(row, (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(rows) > len(TASKS)
    for page, flagfile, measured, seconds in rows:
        beside = (ROOT / "experiments" / flagfile).parent / "README.md"
        for path in (ROOT / page, beside):
            numbers = NUMBER.findall(path.read_text(encoding="utf-8"))
            for number in NUMBER.findall(measured):
                digits = len(number.partition(".")[2])
                rounded = {f"{float(n.replace(',', '')):.{digits}f}" for n in numbers}
                assert number.replace(",", "") in rounded, f"{path}: README.md says {number}"
        if seconds != "not measured":
            assert seconds in (ROOT / page).read_text(encoding="utf-8"), f"{page}: {seconds}"


def test_every_sequence_model_has_a_figure_in_a_table_of_the_families():
    """Beside its name, or on the page whose flagfile it is."""
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs/families").glob("*.md")]
    names = {path.stem for path in (ROOT / "experiments/sequences").glob("*.flags")} - {"base"}
    assert len(names) > 33
    for name in names:
        flagfile = rf"^\| flagfiles? \| \[`experiments/sequences/{name}\.flags`"
        first = rf"{flagfile}.*\n\| measured \|[^`\n]*?\d"
        beside = rf"^\|.*`{name}(\.flags)?`[^|`]*(\d\.\d|\d%)"
        assert any(re.search(f"{first}|{beside}", page, re.MULTILINE) for page in pages), name


def test_every_command_is_in_the_guides():
    guides = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    for path in (ROOT / "genai_jax").glob("*.py"):
        if '__name__ == "__main__"' in path.read_text(encoding="utf-8"):
            assert f"python -m genai_jax.{path.stem}" in guides, path.stem
