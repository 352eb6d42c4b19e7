"""Code from outside this project, which a flag names as "my_package.my_module:Name".

A command imports such code only if its own command line names it: a workdir is data and never
decides what is executed.
"""

import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from genai_jax.errors import ConfigError

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_allowed: set[str] = set()  # what command lines of this process have named


def is_outside(name: str | None) -> bool:
    """Whether a name has the form "module:Name"."""
    return bool(name and _NAME.fullmatch(name))


def outside_name(value: str | None) -> tuple[str, ...]:
    """The outside code that a flag with one name uses."""
    return (value,) if value is not None and is_outside(value) else ()


def allow(names: Iterable[str | None]):
    """Lets this process import the code of these names, which its command line has."""
    _allowed.update(name for name in names if name)


def is_allowed(name: str) -> bool:
    return name in _allowed


def load_outside(flag: str, name: str, requires: Sequence[str] = ()) -> Any:
    """What "module:Name" names.

    Args:
      flag: what named it, for error messages: "--diffusion.network".
      name: the module and what to take from it.
      requires: attributes that it must have.

    Raises:
      ConfigError: it cannot be imported, or lacks an attribute.
    """
    named, (module_name, _, attribute) = f"{flag}={name}", name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the code of somebody else may raise anything
        problem = " ".join(str(error).split())
        raise ConfigError(
            f"{named}: cannot import {module_name}: {type(error).__name__}: {problem}{_hint(error)}"
        ) from error
    loaded = getattr(module, attribute, None)
    if loaded is None:
        raise ConfigError(f"{named}: {module_name} has no {attribute}")
    if missing := [a for a in requires if not hasattr(loaded, a)]:
        raise ConfigError(f"{named} lacks {', '.join(missing)}")
    return loaded


def check_call(flag: str, name: str, function: Callable, count: int, takes: str):
    """Raises `ConfigError` if `function` cannot be called with so many arguments.

    Args:
      flag: what named it.
      name: "module:Name".
      function: what is called.
      count: of positional arguments.
      takes: their names, for the error.
    """
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError as error:
        raise ConfigError(f"{flag}={name} cannot be called with ({takes}): {error}") from None
    except ValueError:  # what is not written in Python has no signature
        pass


def snake_case(name: str) -> str:
    """ "my_package.my_module:MyNetwork" -> "my_network", as it appears in flags and paths."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.rpartition(":")[2]).lower()


def _hint(error: Exception) -> str:
    if not isinstance(error, ModuleNotFoundError):
        return ""
    package = (error.name or "").split(".")[0]
    return f"; run this in the folder that holds {package}, or add that folder to PYTHONPATH"
