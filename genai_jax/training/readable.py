"""Whether a checkpoint is damaged, or cannot be read now: only a damaged one is passed over."""

import errno
import os
import pathlib
import re

from genai_jax.config import ConfigError
from genai_jax.files import MIB, endless_file, read_object, reason_of, unreadable

DESCRIPTION_BYTES = 256 * MIB  # of a file of a checkpoint that holds no arrays
# What the system may say of a damaged checkpoint. Anything else (no permission, an I/O error, a
# server that is gone, too many open files) says nothing about its files.
DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EINVAL, errno.ENAMETOOLONG}


def check_readable(folder: pathlib.Path):
    """Raises `ConfigError` for a folder of checkpoints that orbax could wait in forever.

    Also for one that cannot be listed; one that does not exist is in order.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        raise unreadable(folder, reason_of(error)) from None
    for name in names:
        endless = endless_file(folder / name, DESCRIPTION_BYTES, unlimited="d")
        if endless:
            raise ConfigError(f"{endless}, which no checkpoint has; move it away")


def not_opened(error: Exception, folder: pathlib.Path) -> ConfigError:
    """The error of a folder of checkpoints that orbax cannot open at all; names the file if known.

    Orbax reads this file of every checkpoint when it opens the folder.
    """
    for path in sorted(folder.glob("*/_CHECKPOINT_METADATA")):
        try:
            read_object(path)
        except ConfigError as problem:
            return ConfigError(f"{problem}; move {path.parent} away to use the other checkpoints")
    return unreadable(folder, reason_of(error))


def not_readable(error: BaseException | None, *folders: pathlib.Path) -> str | None:
    """Why files in `folders` could not be read; None if they are damaged.

    Orbax and tensorstore wrap the system's error, keep only its text, or drop it. If it is not in
    the chain that ends with `error`, all files are opened again.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        number = _number(error)
        if number is not None and number not in DAMAGE:
            return os.strerror(number)
        error = error.__cause__ or error.__context__
    return next(filter(None, map(_refused_file, folders)), None)


def _number(error: BaseException) -> int | None:
    """The number of a system error, which tensorstore writes as "[OS error 13: EACCES ...]"."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    quoted = re.search(r"OS error (\d+)", str(error))
    return int(quoted[1]) if quoted else None


def _refused_file(folder: pathlib.Path) -> str | None:
    """A file or folder that the system does not let us open, and why."""
    problems: list[OSError] = []
    for parent, _, names in os.walk(folder, onerror=problems.append):
        for name in names:
            try:
                with open(os.path.join(parent, name), "rb") as file:
                    file.read(1)
            except OSError as problem:
                problems.append(problem)
    refused = [p for p in problems if p.errno not in DAMAGE]
    return f"{refused[0].filename}: {refused[0].strerror}" if refused else None
