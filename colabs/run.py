"""Executes the notebooks of this folder, each from top to bottom in a clean kernel.

python -m colabs.run [NAME ...] [--small]

Without --small, the outputs are written into the notebooks. With it, everything is so small that a
notebook takes less than a minute, and nothing is written. Each notebook works in a temporary folder
of its own, which is deleted afterwards.
"""

import argparse
import hashlib
import os
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
SMALL = "GENAI_JAX_SMALL"  # environment variable: 1 is the small setting
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def names() -> list[str]:
    """The notebooks of this folder, without ``.ipynb``."""
    return sorted(path.stem for path in HERE.glob("*.ipynb"))


def path_of(name: str) -> pathlib.Path:
    return HERE / f"{name}.ipynb"


def read(name: str) -> NotebookNode:
    """A notebook as it is stored."""
    return nbformat.read(path_of(name), as_version=4)


def execute(
    notebook: NotebookNode,
    folder: pathlib.Path,
    *,
    small: bool,
    environment: Mapping[str, str] = os.environ,
    timeout_s: float | None = None,
) -> NotebookNode:
    """The notebook with the outputs of a clean kernel, and without what changes by itself.

    Args:
      notebook: is left as it is.
      folder: where the kernel starts; it need not be in the clone, whose code is used.
      small: whether everything shrinks.
      environment: of the kernel.
      timeout_s: of a cell.

    Raises:
      CellExecutionError: a cell raised an error.
      CellTimeoutError: a cell took too long.
      DeadKernelError: the kernel ended by itself.
      ValueError: the outputs name a folder of this machine.
    """
    notebook = cleared(notebook)
    kernel = {name: value for name, value in environment.items() if name != SMALL}
    kernel["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), kernel.get("PYTHONPATH")]))
    kernel |= {SMALL: "1"} if small else {}
    with tempfile.TemporaryDirectory() as profile:
        kernel["IPYTHONDIR"] = profile  # without the user's own startup files
        client = NotebookClient(
            notebook, timeout=timeout_s, kernel_name="python3", record_timing=False,
            coalesce_streams=True, resources={"metadata": {"path": str(folder)}},
            extra_arguments=["--IPKernelApp.log_level=ERROR"],  # it warns of its local ports
        )  # fmt: skip
        client.execute(env=kernel)
    notebook.metadata = nbformat.from_dict({**METADATA, "executed": sources_hash(notebook)})
    if named := sorted(set(machine_paths(notebook, folder))):
        raise ValueError(f"the outputs name folders of this machine: {', '.join(named)}")
    return notebook


def cleared(notebook: NotebookNode) -> NotebookNode:
    """A copy without outputs, and with metadata and cell ids that are always the same."""
    cells = []
    for index, cell in enumerate(notebook.cells):
        new = nbformat.from_dict({**cell, "id": f"cell-{index:02}", "metadata": {}})
        if cell.cell_type == "code":
            new |= {"outputs": [], "execution_count": None}
        cells.append(new)
    return nbformat.from_dict(
        {"nbformat": 4, "nbformat_minor": 5, "metadata": METADATA, "cells": cells}
    )


def sources_hash(notebook: NotebookNode) -> str:
    """A hash of all code cells: the stored outputs are those of this code."""
    cells = "\0".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(cells.encode()).hexdigest()[:16]


def machine_paths(notebook: NotebookNode, folder: pathlib.Path) -> Iterator[str]:
    """The clone, the home folder, the folder for temporary files, or `folder`, where named."""
    places = [ROOT, pathlib.Path.home(), tempfile.gettempdir(), folder]
    paths = {str(p) for place in places for p in (place, pathlib.Path(place).resolve())} - {"/"}
    pattern = re.compile("|".join(rf"{re.escape(p)}(?![\w+])" for p in sorted(paths)))
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            for text in _texts(output):
                yield from pattern.findall(text)


def _texts(output: NotebookNode) -> Iterator[str]:
    """The texts of an output; pictures in base64 are none."""
    yield output.get("text", "")
    yield "\n".join(output.get("traceback", ()))
    for kind, content in output.get("data", {}).items():
        if isinstance(content, str) and not (kind.startswith("image/") and "svg" not in kind):
            yield content


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="colabs.run", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="of a notebook; all if none")
    parser.add_argument("--small", action="store_true", help="the small setting; writes nothing")
    arguments = parser.parse_args(argv)
    chosen = [pathlib.Path(name).name.removesuffix(".ipynb") for name in arguments.names] or names()
    if unknown := [name for name in chosen if name not in names()]:
        parser.error(f"no notebook {unknown[0]!r}; there are {', '.join(names())}")
    done, failed = {}, False
    for name in chosen:
        start = time.perf_counter()
        try:
            with tempfile.TemporaryDirectory() as folder:
                done[name] = execute(read(name), pathlib.Path(folder), small=arguments.small)
            result = "passed"
        except (CellExecutionError, CellTimeoutError, DeadKernelError, ValueError) as error:
            failed, result = True, f"failed: {error}"
        print(f"{name}: {time.perf_counter() - start:.0f} s, {result}", flush=True)
    if not arguments.small:  # at the end: outputs name the commit, "dirty" once a file has changed
        for name, notebook in done.items():
            nbformat.write(notebook, path_of(name))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
