"""Flagfiles: files with one flag per line, which may include others."""

import json
import os
import re
from collections.abc import Sequence

from genai_jax.errors import ConfigError
from genai_jax.files import read_text, unreadable
from genai_jax.shipped import shipped

MAX_FLAGFILES = 256  # that a command line may include, directly or through others
MAX_FLAGFILE_BYTES = 1 << 18


def expand_flagfiles(argv: Sequence[str]) -> list[str]:
    """Replaces each ``--flagfile=PATH`` in place by the flags in the file, so that later flags win.

    A nested path is relative to the file that names it or, failing that, to the working directory.
    Where there is no experiments/ folder, a path in it is that of the installation.

    Raises:
      ConfigError: a flagfile that cannot be read, that includes itself, or that holds anything but
        flags; too many flagfiles; a NUL character in a flag, which no path and no file can contain.
    """
    expanded = _Flagfiles().expand(argv, ())
    for argument in expanded:
        if "\0" in argument:
            raise ConfigError(f"{argument!r} contains a NUL character")
    return expanded


class _Flagfiles:
    """Expands the flagfiles of one command line."""

    def __init__(self):
        self._count = 0

    def expand(self, argv: Sequence[str], including: tuple[str, ...]) -> list[str]:
        expanded = []
        arguments = iter(argv)
        for argument in arguments:
            name, _, path = argument.partition("=")
            if name not in ("--flagfile", "-flagfile"):
                expanded.append(argument)
                continue
            path = os.path.expanduser(path or next(arguments, ""))
            if including and "\0" not in path:
                beside = os.path.join(os.path.dirname(including[-1]), path)
                path = beside if os.path.exists(beside) else path
            path = shipped(path)
            expanded += self._read(path, including)
        return expanded

    def _read(self, path: str, including: tuple[str, ...]) -> list[str]:
        label = f"flagfile {path!r}" + (f", which {including[-1]} names" if including else "")
        if "\0" not in path and os.path.realpath(path) in map(os.path.realpath, including):
            chain = " -> ".join((*including, path)[-4:])
            raise ConfigError(f"flagfile {path} includes itself: {chain}")
        self._count += 1
        if self._count > MAX_FLAGFILES:
            raise unreadable(path, f"more than {MAX_FLAGFILES} flagfiles include each other", label)
        lines = flag_lines(read_text(path, label, limit=MAX_FLAGFILE_BYTES))
        if not lines:
            raise ConfigError(f"flagfile {path} sets no flag")
        for line in lines:
            if not line.startswith("-"):
                raise ConfigError(f"flagfile {path}: {line!r} is not a flag; write --name=value")
        return self.expand(lines, (*including, path))


# A value that a line cannot hold as it is, written by `Config.to_flags` as a JSON string. No name
# of a flag contains a colon, so that a file without such lines means what it always did.
_ESCAPED = re.compile(r'(--?[^\s=:]+):=(".*")')


def flag_line(name: str, text: str) -> str:
    """The line of a flagfile that sets a flag."""
    if text.isprintable() and text == text.strip():
        return f"--{name}={text}"
    return f"--{name}:={json.dumps(text)}"


def flag_lines(flagfile: str) -> list[str]:
    """The arguments that the text of a flagfile stands for; nested flagfiles are not read."""
    lines = [line.strip() for line in flagfile.split("\n")]
    return [_argument(line) for line in lines if line and not line.startswith(("#", "//"))]


def flag_values(flagfile: str) -> dict[str, str]:
    """Flag name -> value as text, from the text that `Config.to_flags` returned.

    Raises:
      ConfigError: a line that it cannot have written.
    """
    values = {}
    for line in flag_lines(flagfile):
        name, equals, value = line.partition("=")
        if not (equals and name.startswith("--")):
            raise ConfigError(f"{line[:100]!r} is not a line of the form --name=value")
        values[name.removeprefix("--")] = value
    return values


def _argument(line: str) -> str:
    escaped = _ESCAPED.fullmatch(line)
    if not escaped:
        return line
    try:
        return f"{escaped[1]}={json.loads(escaped[2])}"
    except ValueError:
        raise ConfigError(f"{line!r}: what follows := is not a JSON string") from None
