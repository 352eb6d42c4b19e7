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
from genai_jax.files import writing_to


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
    path = workdir / f"{user}.lock"
    with writing_to(f"--workdir={workdir}"):
        workdir.mkdir(parents=True, exist_ok=True)
        # Opened for reading as well, so that a pipe that lies there does not make us wait.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        file = os.fdopen(descriptor, "rb")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = "another process"
            with contextlib.suppress(OSError):
                holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or holder
            raise ConfigError(
                f"--workdir={workdir} is in use by {holder}, a {user} in this folder{note}"
            ) from None
        except OSError as error:
            print(f"note: --workdir={workdir} cannot be locked: {error.strerror}", file=sys.stderr)
        else:
            holder = f"process {os.getpid()} on {socket.gethostname()}"
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, holder.encode(), 0)
        yield file
