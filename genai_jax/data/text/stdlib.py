"""Text that ships with every Python: the documentation and source of its standard library.

There is nothing to download, so it suits first runs and tests. The text differs between Python
versions, and so does the fingerprint of the source.
"""

import ast
import importlib.util
import os
import sysconfig
from collections.abc import Iterator

from genai_jax.config import ConfigError
from genai_jax.data.text.kept_texts import kept_texts

_SKIPPED = {
    "__pycache__", "dist-packages", "distutils", "encodings", "ensurepip", "idlelib", "lib2to3",
    "pydoc_data", "site-packages", "test", "tests", "turtledemo",
}  # fmt: skip
_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docs() -> list[str]:
    """The language reference topics, and one document of docstrings per module."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        topics = {}
    documents = [topics[name].strip() + "\n" for name in sorted(topics)]
    root = sysconfig.get_path("stdlib")
    files = [(file, os.path.join(root, file)) for file in _files(root)]
    return documents + kept_texts("python_docs", files, _docstrings)


def _docstrings() -> list[str]:
    return [text for text in map(docstrings, *zip(*_modules(), strict=True)) if text]


def source() -> list[str]:
    """The source of each module, one document per module."""
    return [text for _, text in _modules()]


def docstrings(module: str, source: str) -> str:
    """The docstrings of a module, each under its qualified name; empty if there are none."""
    return "\n".join(_sections(module, ast.parse(source)))


def module_name(file: str) -> str:
    """ "a/b/__init__.py" -> "a.b"."""
    return file.removesuffix(".py").replace(os.sep, ".").removesuffix(".__init__")


def _modules() -> Iterator[tuple[str, str]]:
    """Yields (module name, source text), sorted by path."""
    root = sysconfig.get_path("stdlib")
    for file in _files(root):
        with open(os.path.join(root, file), "rb") as stream:
            text = importlib.util.decode_source(stream.read())
        if text.strip():
            yield module_name(file), text


def _files(root: str) -> list[str]:
    files = sorted(_python_files(root), key=lambda file: file.split(os.sep))
    if not files:
        raise ConfigError(f"this Python has no standard library source in {root}")
    return files


def _python_files(root: str) -> Iterator[str]:
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not _skipped(name)]
        for name in names:
            if name.endswith(".py") and not _skipped(name):
                yield os.path.relpath(os.path.join(parent, name), root)


def _skipped(name: str) -> bool:
    private = name.startswith("_") and name not in ("__init__.py", "__future__.py")
    return private or name in _SKIPPED or name.startswith("config-")


def _sections(name: str, node: ast.AST) -> Iterator[str]:
    """Yields the docstrings of a module, class or function, each under its qualified name."""
    text = ast.get_docstring(node)
    if text:
        yield f"{name}\n{'-' * len(name)}\n{text}\n"
    for child in node.body:
        if isinstance(child, _DEFINITIONS):
            yield from _sections(f"{name}.{child.name}", child)
