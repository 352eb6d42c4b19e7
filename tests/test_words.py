"""Text for users is plain American English: no word that stands for another one."""

import ast
import re
from collections.abc import Iterator

from tests.conftest import ROOT

# Signs of a translation: what is joined, told, found, drawn, or made has a name of its own.
SIGNS = re.compile(
    r"\b(joined|told|found|drawn|made|anew)\b|\bis no\b(?! (longer|higher|lower|more|less|fewer))",
    re.IGNORECASE,
)
CALLS = ("field", "print", "ConfigError", "ValueError", "Unsupported")
FOLDERS = ("genai_jax", "kernels_pallas", "experiments", "benchmarks")


def spoken(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of the strings in errors, help texts, and printed lines."""
    for node in ast.walk(tree):
        function = getattr(node, "func", None)
        name = getattr(function, "id", getattr(function, "attr", ""))
        if isinstance(node, ast.Raise) or (isinstance(node, ast.Call) and name in CALLS):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
                    yield inner.lineno, inner.value


def test_errors_and_help_texts():
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 200
    odd = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in files
        for line, text in spoken(ast.parse(path.read_text(encoding="utf-8")))
        if SIGNS.search(text)
    ]
    assert odd == []


def test_help_texts_are_sentences():
    odd = []
    for path in (ROOT / "genai_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if getattr(getattr(node, "func", None), "id", "") == "field" and len(node.args) > 1:
                parts = getattr(node.args[1], "values", [node.args[1]])  # of an f-string
                text = "".join(part.value for part in parts if isinstance(part, ast.Constant))
                if not (text[:1].isupper() and text.endswith(".")):
                    odd.append(f"{path.relative_to(ROOT)}:{node.lineno}: {text}")
    assert odd == []


def test_pages():
    pages = [ROOT / "README.md", ROOT / "BUILD_NOTES.md", ROOT / "kernels_pallas" / "README.md"]
    pages += [*(ROOT / "docs").rglob("*.md"), *(ROOT / "experiments").rglob("*.md")]
    odd = [
        f"{page.relative_to(ROOT)}:{number}: {line}"
        for page in pages
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
        if SIGNS.search(line)
    ]
    assert odd == []
