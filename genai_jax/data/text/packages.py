"""Text that every installation has: docstrings and source of the packages that it depends on.

The files are read and parsed, never imported. What a package has as tests is left out. The text
differs between versions of the packages, and so does the fingerprint of the source.
"""

import importlib.metadata
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator

from genai_jax.data.text.kept_texts import kept_texts
from genai_jax.data.text.stdlib import docstrings, module_name
from genai_jax.errors import printable
from genai_jax.files import MIB, read_bytes

PACKAGES = {  # name on PyPI -> name in Python, of what setup.py requires
    "absl-py": "absl",
    "array_record": "array_record",
    "chex": "chex",
    "flax": "flax",
    "grain": "grain",
    "importlib_resources": "importlib_resources",
    "jax": "jax",
    "matplotlib": "matplotlib",
    "numpy": "numpy",
    "optax": "optax",
    "orbax-checkpoint": "orbax",
    "pillow": "PIL",
    "rich": "rich",
    "scikit-learn": "sklearn",
    "scipy": "scipy",
    "tensorboardX": "tensorboardX",
    "tensorflow-datasets": "tensorflow_datasets",
    "tqdm": "tqdm",
}
_TESTS = {"__pycache__", "conftest.py", "test", "testing", "tests"}
_GENERATED = ("_pb2.py", "_pb2_grpc.py")


def docs() -> list[str]:
    """The docstrings of each module, one document per module."""
    files = list(_files())

    def extract():
        print("note: package_docs: parsing the installed packages, once", file=sys.stderr)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # about escapes in their strings
            return [text for file in files if (text := _docstrings(*file))]

    documents = kept_texts("package_docs", files, extract)
    _say("package_docs", documents)
    return documents


def source() -> list[str]:
    """The source of each module, one document per module."""
    documents = [text for file in _files() if (text := _source(file[1])).strip()]
    _say("package_source", documents)
    return documents


def _files() -> Iterator[tuple[str, str]]:
    """Yields (path below site-packages, path) of the modules, by package and path."""
    for package in PACKAGES.values():
        spec = importlib.util.find_spec(package)  # imports nothing: it has no dots
        for root in sorted(spec.submodule_search_locations or ()) if spec else ():
            files = sorted(_python_files(root), key=lambda file: file.split(os.sep))
            yield from ((os.path.join(package, file), os.path.join(root, file)) for file in files)


def _python_files(root: str) -> Iterator[str]:
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not _left_out(name)]
        for name in names:
            path = os.path.join(parent, name)
            if name.endswith(".py") and not _left_out(name) and os.path.isfile(path):
                yield os.path.relpath(path, root)


def _left_out(name: str) -> bool:
    test = name.startswith("test_") or name.endswith("_test.py") or name in _TESTS
    return test or name.startswith(".") or name.endswith(_GENERATED)


def _source(path: str) -> str:
    try:
        return importlib.util.decode_source(read_bytes(path, limit=64 * MIB))
    except (SyntaxError, UnicodeDecodeError):  # a file for other versions of Python, or a template
        return ""


def _docstrings(file: str, path: str) -> str:
    try:
        text = docstrings(module_name(file), _source(path))
        return text.encode("utf-8", "backslashreplace").decode()  # of lone surrogates
    except (SyntaxError, ValueError, RecursionError):
        return ""


def _say(name: str, documents: list[str]):
    size = sum(len(text.encode("utf-8", "surrogateescape")) for text in documents)
    versions = ", ".join(_versions())
    print(
        f"note: {name}: {len(documents):,} modules, {size:,} bytes, of {versions}", file=sys.stderr
    )


def _versions() -> Iterator[str]:
    for package in PACKAGES:
        try:
            yield f"{package} {printable(importlib.metadata.version(package))}"
        except importlib.metadata.PackageNotFoundError:
            continue
