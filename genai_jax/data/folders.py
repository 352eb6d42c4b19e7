"""The files of a folder that a user names."""

import functools
import os

from genai_jax.files import reason_of, unreadable
from genai_jax.standard_streams import message_stream


@functools.cache
def say(text: str):
    """Prints a message once per process, though the data are read for each split."""
    print(text, file=message_stream())


def list_files(folder: str) -> tuple[list[str], dict[str, int]]:
    """The regular files below a folder that are not hidden.

    Links to folders are followed; each folder is read once, however many links lead to it.

    Returns:
      The files, sorted by relative path, and how many of which kind are skipped.

    Raises:
      ConfigError: a folder cannot be read.
    """
    paths, hidden, seen, tops = [], 0, set(), [folder]
    for top in tops:  # grows by links to folders, which come after what is really there
        for parent, folders, names in os.walk(top, onerror=_refuse):
            if os.path.realpath(parent) in seen:
                folders[:] = []
                continue
            seen.add(os.path.realpath(parent))
            hidden += sum(name.startswith(".") for name in (*folders, *names))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            inside = [os.path.join(parent, name) for name in folders]
            tops += [path for path in inside if os.path.islink(path)]
            paths += [os.path.join(parent, name) for name in names if not name.startswith(".")]
    files = [path for path in paths if os.path.isfile(path)]
    files.sort(key=lambda file: os.path.relpath(file, folder).split(os.sep))
    special = len(paths) - len(files)
    return files, {
        "hidden": hidden,
        "not regular (sockets, dangling links)": special,
    }


def _refuse(error: OSError):
    raise unreadable(error.filename, reason_of(error))
