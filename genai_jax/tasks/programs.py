"""Compiled programs that a task keeps from one request to the next."""

from collections.abc import Callable, Hashable
from typing import Any


def cached_program(owner: Any, key: Hashable, build: Callable[[], Any]) -> Any:
    """What `build` returned for this key the first time; it lives as long as its owner.

    A function that is jitted again is compiled again, so whoever samples repeatedly keeps it.

    Args:
      owner: a task, or a model of one.
      key: everything that `build` depends on, besides the owner.
      build: makes a jitted function, or an object that holds some.
    """
    programs = vars(owner).setdefault("_programs", {})
    if key not in programs:
        programs[key] = build()
    return programs[key]
