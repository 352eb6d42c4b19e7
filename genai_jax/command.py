"""How commands end: a user's mistake prints one line and exits non-zero; a bug, a traceback."""

import contextlib
import gc
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence

import absl.logging

from genai_jax import standard_streams
from genai_jax.errors import ConfigError, printable


def _print_error(text: str):
    print(f"error: {printable(text)}", file=sys.stderr)


def _import_jax():
    """Refuses what jax cannot read from the environment, which it does when it is imported."""
    if any(name.startswith("JAX_") for name in os.environ):
        try:
            import jax  # noqa: F401
        except ValueError as error:
            _print_error(f"jax cannot read its environment variables: {error}")
            sys.exit(2)


def _quiet_if_interrupted(kind, error, where):
    """Ctrl-C during the imports needs no traceback."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, where)


# Imports create about a million objects that live until the end. Collecting garbage among them,
# during the imports and again at exit, would take half the time of `--help`.
if getattr(sys.modules["__main__"].__spec__, "name", "").startswith("genai_jax."):
    gc.disable()
    sys.excepthook = _quiet_if_interrupted
    _import_jax()


def run(main: Callable[[Sequence[str]], int | None]) -> None:
    """Calls `main` with the command line's arguments and exits.

    The exit code is that of `main`, 2 after a mistake, 130 if interrupted, and 141 if everything
    went well but the reader of standard output left early, as in `| head`.
    """
    gc.freeze()
    gc.enable()
    standard_streams.set_up()
    _quiet()
    _give_simulated_devices_threads()
    os.environ["MPLBACKEND"] = "agg"  # figures go to files alone, whatever the user's notebooks do
    try:
        code = main(sys.argv[1:])
        if not standard_streams.flush():
            code = code or standard_streams.READER_GONE
    except ConfigError as error:
        _print_error(str(error))
        code = 2
    except OSError as error:
        _print_error(": ".join(map(str, filter(None, (error.filename, error.strerror or error)))))
        code = 2
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends already
        code = 130
    except Exception as error:
        if not (problem := _of_this_machine(error)):
            raise
        _print_error(problem)
        code = 2
    gc.freeze()
    with contextlib.suppress(ConfigError):  # not what ended the command
        standard_streams.flush()
    sys.exit(code)


def _of_this_machine(error: Exception) -> str:
    """What this machine lacks, if that is why jax raised an error; else empty."""
    text = (str(error).splitlines() or [type(error).__name__])[0]
    exhausted = isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    if exhausted or isinstance(error, MemoryError):
        return f"out of memory: {text}"
    if traceback.extract_tb(error.__traceback__)[-1].filename.endswith("xla_bridge.py"):
        names = ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES")
        given = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
        return f"jax cannot start the devices of {' '.join(given) or 'this machine'}: {text}"
    return ""


def _quiet():
    """Silences Orbax, which logs its options at length and repeats every error that it raises."""
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)

    def print_traceback(problem):
        # Tensorstore writes that end after a failed save find the event loop closed.
        if str(problem.exc_value) != "Event loop is closed":
            sys.__unraisablehook__(problem)

    sys.unraisablehook = print_traceback


def _give_simulated_devices_threads():
    """Keeps devices that XLA simulates on a CPU from waiting for each other forever.

    Each waits in a collective on a thread of XLA's own, and may be in several at once. With as many
    threads as devices, XLA's default, all can wait for a collective that no thread is left to run.
    XLA reads their number from `NPROC` when jax first asks for its devices.
    """
    devices = os.environ.get("JAX_NUM_CPU_DEVICES", "")
    if devices.isdigit() and int(devices) > 1:
        os.environ.setdefault("NPROC", str(8 * int(devices)))
