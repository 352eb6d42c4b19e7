"""How every command ends: a user's mistake is one line and a non-zero exit, a bug a traceback."""

import gc
import logging
import sys
from collections.abc import Callable, Sequence

import absl.logging

from genai_jax.config import ConfigError

# Imports make a million objects that stay. To look for garbage among them, as they come and again
# at the end, is half of what `--help` would take.
if getattr(sys.modules["__main__"].__spec__, "name", "").startswith("genai_jax."):
    gc.disable()


def run(main: Callable[[Sequence[str]], int | None]) -> None:
    """Calls `main` with the command line's arguments and exits."""
    gc.freeze()
    gc.enable()
    _quiet()
    try:
        code = main(sys.argv[1:])
    except (ConfigError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    gc.freeze()
    sys.stdout.flush()
    sys.exit(code)


def _quiet():
    """Orbax explains its options at length, and a failed save, which it also raises, many times."""
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)

    def print_traceback(problem):
        # Writes of tensorstore that end after a save has failed have nobody left to tell.
        if str(problem.exc_value) != "Event loop is closed":
            sys.__unraisablehook__(problem)

    sys.unraisablehook = print_traceback
