"""How every command ends: a user's mistake is one line and a non-zero exit, a bug a traceback."""

import sys
from collections.abc import Callable, Sequence

from absl import logging

from genai_jax.config import ConfigError


def run(main: Callable[[Sequence[str]], int | None]) -> None:
    """Calls `main` with the command line's arguments and exits."""
    logging.set_verbosity(logging.ERROR)  # orbax explains its options at length
    try:
        code = main(sys.argv[1:])
    except (ConfigError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    sys.stdout.flush()
    sys.exit(code)
