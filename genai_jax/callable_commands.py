"""Commands that Python calls by the name of their module: `genai_jax.fit(...)` fits."""

import inspect
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

from genai_jax.config import parse


def callable_as(function: Callable) -> None:
    """Makes the module of `function` callable: a call of the module is one of the function."""

    class CallableModule(types.ModuleType):
        # Read by inspect, and thus by notebooks, which show it as the module's help.
        __signature__ = property(lambda self: inspect.signature(function))

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

    CallableModule.__call__.__doc__ = function.__doc__
    sys.modules[function.__module__].__class__ = CallableModule


def request_of(cls: type, flags: Mapping[str, Any]) -> Any:
    """The request `cls` of a command with Python values as its flags.

    Raises:
      ConfigError: a flag that the command does not have, or a value that is not allowed.
    """
    # Not before `genai_jax.command` is imported, which checks jax's environment variables.
    from genai_jax.keyword_flags import as_flags

    return parse(as_flags(flags), {"run": cls})[0].run
