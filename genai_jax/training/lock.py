"""Keeps two processes from writing into one workdir."""

import contextlib
import fcntl
import os
import pathlib
import socket
import sys
from collections.abc import Iterator
from typing import IO

from genai_jax.config import ConfigError


@contextlib.contextmanager
def locked(workdir: str | pathlib.Path, user: str, note: str = "") -> Iterator[IO]:
    """While entered, no other process can enter with the same `workdir` and `user`.

    The kernel releases the lock when the process ends, in whatever way. It belongs to the open
    file: child processes that inherit the file hold the lock for as long as they live. On a file
    system without locks, a line on stderr says so.

    Args:
      workdir: a folder, created if need be.
      user: what works in it, such as "run"; the lock is on the file ``user.lock``.
      note: what else may hold the lock, for the error message.

    Raises:
      ConfigError: another process holds the lock, or `workdir` cannot be written to.
    """
    workdir = pathlib.Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(workdir / f"{user}.lock", "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise ConfigError(f"cannot write to --workdir={workdir}: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ConfigError(
                f"--workdir={workdir} is in use by {holder}, a {user} in this folder{note}"
            ) from None
        except OSError as error:
            print(f"note: --workdir={workdir} cannot be locked: {error.strerror}", file=sys.stderr)
        else:
            file.truncate(0)
            print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
        yield file
