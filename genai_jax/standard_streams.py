"""Standard output and standard error that neither stop nor crash a command.

Whoever reads them may leave at any time (`| head`, a terminal that closes), and may not know the
characters that a model generates.
"""

import errno
import io
import os
import sys
from typing import TextIO

from genai_jax.config import ConfigError

STDOUT, STDERR = 1, 2
READER_GONE = 141  # exit code: 128 + SIGPIPE, as of other programs in a pipeline


def interactive() -> bool:
    """Whether a person types at this process: in a notebook, IPython, or Python's own prompt."""
    return hasattr(sys, "ps1")


def message_stream() -> TextIO:
    """Where messages and progress go: stderr, or stdout in a notebook, which marks stderr red."""
    return sys.stdout if interactive() and not sys.stderr.isatty() else sys.stderr


class Stream(io.FileIO):
    """Writes to a standard stream, and drops everything once its reader has gone.

    Standard error also drops everything after any other error: there is nowhere to report it.

    Raises:
      ConfigError: standard output cannot be written for another reason, such as a full disk.
    """

    def __init__(self, number: int, descriptor: int):
        super().__init__(descriptor, "w", closefd=False)
        self._number, self.lost = number, False

    def write(self, data) -> int:
        try:
            written = super().write(data)
        except OSError as error:
            self._drop_the_rest()
            if self._number == STDOUT and error.errno != errno.EPIPE:
                raise ConfigError(f"cannot write to standard output: {error.strerror}") from None
            self.lost = True
            return len(data)
        # None: the reader of a descriptor that does not block is slow. Messages may be skipped.
        return len(data) if written is None and self._number == STDERR else written

    def _drop_the_rest(self):
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), self.fileno())


def text_stream(number: int, descriptor: int, encoding: str) -> io.TextIOWrapper:
    """A `Stream` for text, which escapes the characters that the encoding lacks.

    Args:
      number: `STDOUT` or `STDERR`, as which the stream counts.
      descriptor: of the open file to write to.
      encoding: of the text.
    """
    stream = Stream(number, descriptor)
    return io.TextIOWrapper(
        io.BufferedWriter(stream),
        encoding,
        errors="backslashreplace",
        line_buffering=number == STDERR or stream.isatty(),
        write_through=number == STDERR,
    )


def set_up():
    """Replaces the streams that the process started with by ones that last.

    A descriptor that is closed (`2>&-`) is opened onto nothing: the next file to be opened would
    get its number, and whatever libraries print would be written into that file.
    """
    for descriptor in (0, STDOUT, STDERR):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    if sys.stdout is sys.__stdout__:  # else a test or a notebook captures them
        encoding = sys.stdout.encoding if sys.stdout else "utf-8"
        sys.stdout = text_stream(STDOUT, STDOUT, encoding)
    if sys.stderr is sys.__stderr__:
        encoding = sys.stderr.encoding if sys.stderr else "utf-8"
        sys.stderr = text_stream(STDERR, STDERR, encoding)


def flush() -> bool:
    """Writes what is buffered for standard output; returns whether its reader is still there.

    Raises:
      ConfigError: it cannot be written.
    """
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return not (isinstance(raw, Stream) and raw.lost)
