"""How every command ends: a user's mistake is one line and a non-zero exit, a bug a traceback."""

import logging
import sys
from collections.abc import Callable, Sequence

import absl.logging

from genai_jax.config import ConfigError


def run(main: Callable[[Sequence[str]], int | None]) -> None:
    """Calls `main` with the command line's arguments and exits."""
    _quiet()
    try:
        code = main(sys.argv[1:])
    except (ConfigError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
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
