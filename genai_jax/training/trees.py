"""Parts of nested dictionaries of parameters, named by the paths of their arrays."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax

from genai_jax.config import ConfigError

PyTree = Any


def path_name(path) -> str:
    """A key path as text: "model/layers/mlp/up/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaf_paths(tree: PyTree) -> list[str]:
    """The paths of all arrays of a tree."""
    return [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def select(tree: PyTree, paths: Collection[str]) -> PyTree:
    """The part of a nested dictionary that has these arrays.

    Raises:
      ValueError: the paths name some arrays, but not all, of a node that is not a dictionary.
    """
    paths = frozenset(paths)

    def part(node: PyTree, prefix: str) -> PyTree | None:
        if isinstance(node, dict):
            chosen = {key: part(value, f"{prefix}{key}/") for key, value in node.items()}
            return {key: value for key, value in chosen.items() if value is not None} or None
        names = [f"{prefix}{name}".rstrip("/") for name in leaf_paths(node)]
        taken = [name in paths for name in names]
        if any(taken) and not all(taken):
            raise ValueError(f"{prefix} is not a dictionary, so it cannot be taken apart")
        return node if any(taken) else None

    return part(tree, "") or {}


def overlay(whole: PyTree, part: PyTree) -> PyTree:
    """`whole` with the arrays of `part` in their places, in nested dictionaries."""
    if not (isinstance(part, dict) and isinstance(whole, dict)):
        return part
    return {**whole, **{name: overlay(whole[name], value) for name, value in part.items()}}


def merged(a: PyTree, b: PyTree) -> PyTree:
    """The nested dictionary with what either has; where both have an array, that of `b`."""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return b
    return {**a, **{name: merged(a[name], x) if name in a else x for name, x in b.items()}}


def dictionaries(tree: PyTree) -> dict:
    """The nested dictionaries of a tree, without its arrays."""
    return {name: dictionaries(x) for name, x in tree.items() if isinstance(x, dict)}


def nested(flat: Mapping[str, Any]) -> dict:
    """{"a/b": x} -> {"a": {"b": x}}."""
    tree: dict = {}
    for path, value in flat.items():
        *folders, last = path.split("/")
        node = tree
        for name in folders:
            node = node.setdefault(name, {})
        node[last] = value
    return tree


def matching_paths(params: PyTree, patterns: Sequence[str], user: str) -> frozenset[str]:
    """The paths of the parameters that any of the patterns names.

    A pattern is the path of an array or of a group of them ("model", "model/head"), or else a
    regular expression that is searched for in every path ("/bias$").

    Raises:
      ConfigError: a pattern that matches nothing, or is not a regular expression. `user` says in
        the message where the pattern comes from.
    """
    paths = leaf_paths(params)
    matched: set[str] = set()
    for pattern in patterns:
        within = [p for p in paths if f"{p}/".startswith(f"{pattern}/")]
        if not within:
            try:
                within = [p for p in paths if re.search(pattern, p)]
            except re.error as error:
                raise ConfigError(
                    f"{user}: {pattern!r} is not a regular expression: {error}"
                ) from None
        if not within:
            groups = ", ".join(sorted({p.split("/")[0] for p in paths}))
            raise ConfigError(f"{user}: {pattern!r} matches no parameter; the groups are {groups}")
        matched.update(within)
    return frozenset(matched)
