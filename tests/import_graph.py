"""The imports of the project, read from its source without running it."""

import ast
import pathlib
from collections.abc import Iterator

from tests.conftest import ROOT


def modules() -> dict[str, pathlib.Path]:
    """Name -> file of every module of genai_jax and kernels_pallas."""
    files = [*(ROOT / "genai_jax").rglob("*.py"), *(ROOT / "kernels_pallas").rglob("*.py")]
    return {_name(path): path for path in files}


def _name(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(name: str, path: pathlib.Path, known: dict) -> set[str]:
    """The modules of the project that a module imports, inside functions as well."""
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in known else base)
    return {module for module in found if module in known and module != name}


def graph() -> dict[str, set[str]]:
    """Module -> the modules that it imports."""
    known = modules()
    return {name: imports(name, path, known) for name, path in known.items()}


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """The sets of modules that import each other (Tarjan's strongly connected components)."""
    index, low, on_stack = {}, {}, set()
    stack: list[str] = []
    components: list[list[str]] = []

    def visit(node: str):
        index[node] = low[node] = len(index)
        stack.append(node)
        on_stack.add(node)
        for other in edges[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in on_stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = list(_popped(stack, on_stack, node))
            if len(component) > 1:
                components.append(sorted(component))

    for node in edges:
        if node not in index:
            visit(node)
    return components


def _popped(stack: list[str], on_stack: set[str], until: str) -> Iterator[str]:
    while True:
        node = stack.pop()
        on_stack.discard(node)
        yield node
        if node == until:
            return
