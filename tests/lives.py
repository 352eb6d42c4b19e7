"""Processes of `genai_jax.train` that start at once: forked from one that has imported it.

    python -m tests.lives TASK ...

Reads lines of JSON, [file for its output, flags ...], and starts one process at a time; writes its
id, and its exit code once it has ended. A process is a whole one: it compiles, trains, and may be
killed. Only the imports, most of the time of a short run, are done once. jax must not have started
any device before the fork.
"""

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Sequence


class Lives:
    """Starts processes; within this context there is the one that they are forked from.

    Args:
      tasks: that are imported once; others are imported by each process.
    """

    def __init__(self, tasks: Sequence[str]):
        self._tasks = tasks

    def __enter__(self):
        from tests.commands import environment
        from tests.conftest import ROOT

        command = [sys.executable, "-m", "tests.lives", *self._tasks]
        self._server = subprocess.Popen(
            command, env=environment(), cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._folder = tempfile.TemporaryDirectory()
        return self

    def __exit__(self, *_):
        self._server.communicate()  # it ends at the end of its input
        self._folder.cleanup()

    def start(self, *flags: str) -> "Life":
        """Starts ``train`` with these flags; the life before must have ended."""
        output = os.path.join(self._folder.name, "output")
        self._server.stdin.write(json.dumps([output, *flags]) + "\n")
        self._server.stdin.flush()
        return Life(int(self._server.stdout.readline()), output, self._server.stdout)


class Life:
    def __init__(self, process: int, output: str, answers):
        self.process, self._output, self._answers = process, output, answers

    def ended(self) -> bool:
        return bool(select.select([self._answers], [], [], 0)[0])

    def wait(self) -> tuple[int, str]:
        """Waits for its end; returns (exit code, or minus the signal, and what it printed)."""
        code = int(self._answers.readline())
        with open(self._output, encoding="utf-8") as file:
            return code, file.read()


def serve(tasks: Sequence[str]):
    import matplotlib.pyplot  # noqa: F401
    import orbax.checkpoint  # noqa: F401
    import tensorboardX.summary  # noqa: F401

    from genai_jax import command, train
    from genai_jax.tasks.registry import task_class
    from genai_jax.training import hardware, loop  # noqa: F401

    # Half the time of a short run would be spent on measuring this machine.
    hardware.measured_matmul_rate = lambda *_: 1e11

    for name in tasks:
        task_class(name)
    while request := sys.stdin.readline():
        output, *flags = json.loads(request)
        process = os.fork()
        if process == 0:
            log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream, descriptor in enumerate((os.open(os.devnull, os.O_RDONLY), log, log)):
                os.dup2(descriptor, stream)
            sys.argv = ["train", *flags]
            command.run(train.main)
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1:])
