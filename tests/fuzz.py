"""Calls every command with odd flags, files, and environments, and looks how it ends.

    python -m tests.fuzz [--calls=2000] [--seed=0] [--families=language_model,gan] [--folder=DIR]

A call may end well, or with exit code 2 and one line, "error: ...", that names what it is about.
What cannot mean anything must be refused. Prints each call that ends otherwise, as a line for a
shell, and a summary. Each call is a process of its own, forked from one that has imported
everything but has not started jax; some are whole processes.
"""

import argparse
import importlib
import io
import json
import os
import pathlib
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from tests.fuzz_calls import COMMANDS, Call, Calls, families_of, write_files

SECONDS = 120  # that a call may take
WORKERS = 2
MEMORY = 12 << 30  # bytes of address space of a call
BAD = ("traceback", "hang", "ignored nonsense", "other")
MAY_PRECEDE = ("note: ", "warning: ", "changed since the run began: ")
EXPLAINS = r"--[a-z]|files/|new/|out of memory|needs .* GiB|is (nan|-?inf) at step|not finite"
ROOT = pathlib.Path(__file__).parent.parent


class Result(NamedTuple):
    call: Call
    code: int | None  # minus the signal that ended it; None: it took too long
    out: str
    err: str
    seconds: float

    def ending(self) -> str:
        """`ok`, `refused`, or one of `BAD`."""
        code, err = self.code, self.err
        if code is None:
            return "hang"
        if "Traceback (most recent call last)" in err or "Error ignored in" in err:
            return "traceback"
        if code == 0 or (code == 141 and self.call.stdout == "gone"):
            return "ignored nonsense" if self.call.refused else "ok"
        if code == 1 and self.call.command in ("study", "compile_check") and err.count("error") < 2:
            return "ignored nonsense" if self.call.refused else "ok"  # it failed, or does not fit
        lines = [x for x in err.splitlines() if x.strip() and not x.startswith(MAY_PRECEDE)]
        well = code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
        return "refused" if well and self._names(lines[0]) else "other"

    def _names(self, line: str) -> bool:
        """Whether a line says what it is about."""
        call = self.call
        if not (call.names or call.environment or call.stdout):  # nothing is odd
            return False
        escaped = [name.encode("unicode_escape").decode() for name in call.names]
        named = any(n and n[:40] in line for n in (*call.names, *escaped))
        named = named or any(set(re.split("[._]", n)) <= {*line.split()} for n in call.names)
        named = named or any(name.lower() in line.lower() for name in call.environment)
        if named or (call.stdout == "full" and "standard output" in line):
            return True
        # Among several odd things, one may make another flag wrong.
        return not call.refused and bool(re.search(EXPLAINS, line))

    def __str__(self):
        said = (self.err.strip().splitlines() or [""])[-1]
        how = f"{self.ending()} ({self.code}, {self.seconds:.1f} s)"
        return f"{how}: {shown(self.call)}\n    {said[:300]}"


def shown(call: Call) -> str:
    """A line for a shell that calls the command again, in the same folder."""
    unset = [f"-u {name}" for name, value in call.environment.items() if value is None]
    pairs = [f"{n}={shlex.quote(v)}" for n, v in call.environment.items() if v is not None]
    flags = [shlex.quote(a) if a.isprintable() else "$" + repr(a) for a in call.arguments]
    flags = [f if len(f) < 200 else f[:100] + "..." for f in flags]
    streams = {"closed": " >&-", "full": " >/dev/full", "gone": " | true", "": ""}[call.stdout]
    streams += " <&-" if call.stdin == "closed" else ""
    words = ["env", *unset, *pairs, "python -m", f"genai_jax.{call.command}", *flags]
    return " ".join(words[0 if unset or pairs else 1 :]) + streams


def run_calls(calls: Iterable[Call], folder: pathlib.Path) -> Iterator[Result]:
    """Runs the calls in processes forked from one server."""
    from tests.commands import environment

    with tempfile.TemporaryFile("w+") as file:
        calls = list(calls)
        file.writelines(json.dumps(call) + "\n" for call in calls)
        file.seek(0)
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz", "--serve", str(folder)], env=environment(),
            cwd=ROOT, stdin=file, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        for line in server.stdout:
            number, *rest = json.loads(line)
            yield Result(calls[number], *rest)
        if server.wait():
            raise SystemExit(f"the server ended with exit code {server.returncode}")


# What follows runs in the server.


def serve(folder: pathlib.Path):
    """Starts the calls that standard input holds, two at a time, and prints how they ended."""
    modules = {name: importlib.import_module(f"genai_jax.{name}") for name in COMMANDS}
    _import_the_rest()
    calls = [Call(*json.loads(line)) for line in sys.stdin]
    running, waiting = {}, list(enumerate(calls))[::-1]
    while running or waiting:
        while waiting and len(running) < WORKERS:
            number, call = waiting.pop()
            paths = [folder / f"{stream}.{number}" for stream in ("out", "err")]
            if (process := os.fork()) == 0:
                _become(call, modules[call.command], folder, paths)
                return
            running[process] = (number, paths, time.monotonic())
        for process, (number, paths, began) in [*running.items()]:
            seconds = time.monotonic() - began
            late = seconds > SECONDS
            if late:
                os.killpg(process, signal.SIGKILL)
            ended, status = os.waitpid(process, 0 if late else os.WNOHANG)
            if ended:
                code = None if late else os.waitstatus_to_exitcode(status)
                said = [path.read_text("utf-8", "replace")[-20000:] for path in paths]
                print(json.dumps([number, code, *said, seconds]), flush=True)
                for path in paths:
                    path.unlink()
                del running[process]
        time.sleep(0.005)


def _import_the_rest():
    """What commands import once they know what to do."""
    import matplotlib.pyplot  # noqa: F401
    import orbax.checkpoint  # noqa: F401
    import scipy.optimize  # noqa: F401
    import tensorboardX.summary  # noqa: F401

    from genai_jax.scaling import coordinate_check, report  # noqa: F401
    from genai_jax.scaling.fits import analysis  # noqa: F401
    from genai_jax.scaling.study import session
    from genai_jax.scaling.study.runs import Outcome
    from genai_jax.tasks.registry import TASKS, task_class
    from genai_jax.training import hardware, loop  # noqa: F401

    for name in TASKS:
        task_class(name)
    hardware.measured_matmul_rate = lambda *_: 1e11  # instead of measuring it
    session.execute = lambda runs, **_: Outcome({r.name: "not trained here" for r in runs}, 0)


def _become(call: Call, module, folder: pathlib.Path, paths: list[pathlib.Path]):
    """Makes this process the one of the call."""
    os.setsid()
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for name, value in call.environment.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    _open_streams(call, paths)
    if call.fresh:
        os.environ["PYTHONPATH"] = str(ROOT)
        # XLA compiles for as many threads as NPROC says, which is not in the key of the cache that
        # the tests share: others would get that program, and differ in the last bit.
        if "NPROC" in call.environment:
            os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        command = [sys.executable, "-m", f"genai_jax.{call.command}", *call.arguments]
        os.execv(sys.executable, command)
    import jax

    if devices := call.environment.get("JAX_NUM_CPU_DEVICES"):
        jax.config.update("jax_num_cpu_devices", int(devices))
    if cache := call.environment.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", cache)
    from genai_jax import command

    sys.argv = [call.command, *call.arguments]
    command.run(module.main)


def _open_streams(call: Call, paths: list[pathlib.Path]):
    out, err = (os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for path in paths)
    if call.stdout == "full":
        out = os.open("/dev/full", os.O_WRONLY)
    elif call.stdout == "gone":
        reader, out = os.pipe()
        os.close(reader)
    null = os.open(os.devnull, os.O_RDONLY)
    for stream, descriptor in enumerate((null, out, err)):
        os.dup2(descriptor, stream)
    os.closerange(3, 256)
    sys.stdin = sys.__stdin__ = None if call.stdin == "closed" else io.StringIO()
    if call.stdin == "closed":
        os.close(0)
    if call.stdout == "closed":
        os.close(1)
        sys.stdout = sys.__stdout__ = None


def prepare(families: dict[str, list[str]], folder: pathlib.Path) -> list[Result]:
    """Writes the files, and trains the runs that sample and evaluate use; returns what failed."""
    write_files(folder, families)
    last = {"code_prior"} & {*families}  # it needs the autoencoder
    trained = []
    for names in filter(None, ({*families} - last, last)):
        flags = [[f"--flagfile=files/{n}.flags", f"--workdir=runs/{n}"] for n in sorted(names)]
        trained += run_calls([Call("train", f, {}) for f in flags], folder)
    return [result for result in trained if result.code]


def main(argv: list[str]) -> int:
    if argv[:1] == ["--serve"]:
        serve(pathlib.Path(argv[1]))
        return 0
    from tests.kill import FAMILIES

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=2000, help="Number of calls.")
    parser.add_argument("--seed", type=int, default=0, help="Of the calls.")
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--folder", type=pathlib.Path, help="New folder for the files; kept.")
    parser.add_argument("--all", action="store_true", help="Print the calls that end well, too.")
    options = parser.parse_args(argv)
    folder = options.folder or pathlib.Path(tempfile.mkdtemp())
    folder = folder.absolute()
    flags = {n: [f.format(folder="files") for f in x] for n, x in FAMILIES.items()}
    flags["code_prior"] = [f.replace("files/autoencoder/whole", "runs/autoencoder")
                           for f in flags["code_prior"]]  # fmt: skip
    families = families_of(options.families.split(","), flags)
    for result in prepare(families, folder):
        raise SystemExit(f"the tiny run failed: {result}")
    calls = Calls(families, options.seed)
    plain = [calls.plain(command, "language_model") for command in COMMANDS[:-1]]
    endings = Counter()
    for result in run_calls([*plain, *(calls.next() for _ in range(options.calls))], folder):
        endings[result.ending()] += 1
        if result.ending() in BAD or options.all:
            print(result, flush=True)
    bad = ", ".join(f"{name} {endings[name]}" for name in BAD)
    print(f"{endings.total()} calls: ok {endings['ok']}, refused {endings['refused']}, {bad}")
    failed = any(endings[name] for name in BAD)
    if not options.folder:
        shutil.rmtree(folder)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
