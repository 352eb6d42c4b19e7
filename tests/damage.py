"""Every file of a run, damaged in every way, against every command; each cell must end well.

`python -m tests.damage WORK` trains one tiny run as a study of one run, and prints one JSON object
per cell: the file, the damage, the command, and how it ended. `--cells=N` takes a sample of so many
cells, the same every time. A command may succeed or refuse with one line; it may neither raise
anything else, nor wait, nor touch what is intact.
"""

import argparse
import contextlib
import io
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import time

import absl.logging

from genai_jax import evaluate, model_card, sample, study, train
from genai_jax.config import ConfigError
from genai_jax.scaling.study import session
from genai_jax.scaling.study.runs import Outcome

COMMANDS = ("train", "sample", "evaluate", "study", "model_card")
SECONDS = 60  # that a cell may take
NOBODY = 65534  # reads no file without permission, even if the tests are run by root
DOCUMENTS = "the cat saw a red fox near my old barn\n" * 400
FLAGS = (
    "--data.tokenizer={tokenizer}", "--data.dataset=text:{text}", "--data.batch_size=2",
    "--data.sequence_length=8", "--transformer.num_layers=1", "--transformer.embed_dim=4",
    "--transformer.num_heads=1", "--train.progress=false", "--eval.batches=1",
    "--ema.relative_width=0.1", "--ema.snapshot_every=2", "--checkpoint.every=2", "--train.steps=4",
)  # fmt: skip


def _flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0x41]) + data[middle + 1 :] if data else b"A"


CONTENTS = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "flipped": _flip,
    "other type": lambda data: b"[1, 2]\n",
    "deep": lambda data: b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "digits": lambda data: b'{"step": ' + b"1" * 1_000_000 + b"}\n",
    "not UTF-8": lambda data: b"\xff\xfe" + data,
}
OTHERS = ("huge", "folder", "no permission", "pipe", "link to itself", "missing")
DAMAGES = (*CONTENTS, *OTHERS)
FOLDERS = ("work/runs/a/checkpoints", "work/runs/a/checkpoints/4", "work/runs/a/ema")


def damage(path: pathlib.Path, kind: str):
    """Replaces a file."""
    if kind == "no permission":
        path.chmod(0)
        return
    if path.is_dir():
        shutil.rmtree(path)
        data = b""
    else:
        data = path.read_bytes()
        path.unlink()
    if kind in CONTENTS:
        path.write_bytes(CONTENTS[kind](data))
    elif kind == "huge":
        with open(path, "wb") as file:
            file.truncate(1 << 40)  # sparse: it takes no space
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to itself":
        path.symlink_to(path)


class Matrix:
    """The run, and a copy of it for each cell."""

    def __init__(self, work: pathlib.Path):
        self.whole = work / "whole"
        self.whole.mkdir()
        self._write_study()
        assert train.main([f"--flagfile={self.study / 'a.flags'}", f"--workdir={self.run}"]) == 0
        (self.run / "study.json").write_text(
            '{"code": 0, "error": "", "seconds": 1.0, "began_at": 0}\n'
        )
        for command in COMMANDS:  # imports and compiles what they need, and is the control
            assert self._ending(command, "") == ("ok", "")

    @property
    def study(self) -> pathlib.Path:
        return self.whole / "study"

    @property
    def run(self) -> pathlib.Path:
        return self.whole / "work" / "runs" / "a"

    def _write_study(self):
        from tokenizers import Tokenizer, models, pre_tokenizers

        self.study.mkdir()
        words = dict.fromkeys(["</s>", "[UNK]", *DOCUMENTS.split()])
        ids = {word: i for i, word in enumerate(words)}
        tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.add_special_tokens(["</s>"])
        tokenizer.save(str(self.study / "tokenizer.json"))
        (self.study / "text.txt").write_text(DOCUMENTS)
        places = {"tokenizer": self.study / "tokenizer.json", "text": self.study / "text.txt"}
        (self.study / "base.flags").write_text("\n".join(FLAGS).format(**places) + "\n")
        (self.study / "a.flags").write_text("--flagfile=base.flags\n--seed=1\n")
        (self.study / "study.flags").write_text("--study.analysis=curves\n")
        (self.study / "README.md").write_text("# A tiny study\n\nDoes it read its files?\n")

    def cells(self) -> list[tuple[str, str, str]]:
        """(file, damage, command); the plots, logs, and events of a run are read by nobody."""
        paths = [p for p in self.whole.rglob("*") if p.is_file() and p.name != "text.txt"]
        arrays = {p.parent: p for p in sorted(paths, key=lambda p: p.stat().st_size)}
        paths = [p for p in paths if p.parent.name != "d" or arrays[p.parent] == p]
        paths.sort(key=lambda p: p.parent if p.parent.name == "d" else p)  # its name is random
        files = [str(p.relative_to(self.whole)) for p in paths]
        read = [f for f in files if not any(x in f for x in ("plots/", "tensorboard/", "report/"))]
        return [
            (file, kind, command)
            for file in (*read, *FOLDERS)
            for kind in (DAMAGES if file not in FOLDERS else ("empty", *OTHERS[2:]))
            for command in COMMANDS
            if self._is_read(file, command)
        ]

    def _is_read(self, file: str, command: str) -> bool:
        if command == "study":
            return "checkpoints" not in file
        return command == "train" or not file.startswith("study/") or "json" in file

    def run_cell(self, file: str, kind: str, command: str) -> dict:
        """How a command ends that meets the damage; "ending" is "ok", "refused", or a fault."""
        kept = self.whole.with_name("kept")
        os.replace(self.whole, kept)
        shutil.copytree(kept, self.whole)
        try:
            damage(self.whole / file, kind)
            before = _intact(self.whole, file)
            out, err, began = io.StringIO(), io.StringIO(), time.perf_counter()
            bound = _bound_by_permissions(self.whole) if kind == "no permission" else _as_we_are()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), bound:
                ending, said = self._ending(command, file)
            changed = _changed(self.whole, before, command)
            if changed and ending in ("ok", "refused"):
                ending, said = "touched", f"{changed}; {said}"
            seconds = round(time.perf_counter() - began, 2)
            return dict(file=file, damage=kind, command=command, ending=ending, said=said,
                        warned=err.getvalue(), seconds=seconds)  # fmt: skip
        finally:
            shutil.rmtree(self.whole)
            os.replace(kept, self.whole)

    def _ending(self, command: str, file: str) -> tuple[str, str]:
        card = self.whole / "card.md"
        mains = {
            "model_card": (model_card, f"--workdir={self.run}", f"--output={card}"),
            "train": (train, f"--flagfile={self.study / 'a.flags'}", f"--workdir={self.run}"),
            "sample": (sample, f"--workdir={self.run}", "--max_tokens=1", "--ema=width:0.1"),
            "evaluate": (evaluate, f"--workdir={self.run}", "--batches=1"),
            "study": (study, f"--study={self.study}", f"--workdir={self.whole / 'work'}"),
        }
        module, *flags = mains[command]
        signal.signal(signal.SIGALRM, _too_slow)
        signal.alarm(SECONDS)
        try:
            return ("ok" if module.main(flags) in (0, 1) else "exit code", "")
        except ConfigError as error:
            said = str(error)
            names = (file, pathlib.Path(file).name, str(self.run), str(self.study))
            # What a flagfile says may be wrong, which names the flag.
            named = any(name in said for name in names) or (".flags" in file and "--" in said)
            return ("refused" if named and "\n" not in said else "unnamed", said)
        except TimeoutError:
            return "too slow", ""
        except BaseException as error:
            return "raised", f"{type(error).__name__}: {error}"[:500]
        finally:
            signal.alarm(0)
            card.unlink(missing_ok=True)


def _too_slow(*_):
    raise TimeoutError


_as_we_are = contextlib.nullcontext


@contextlib.contextmanager
def _bound_by_permissions(folder: pathlib.Path):
    """While entered, permissions bind this process even if it is root's; it owns the folder."""
    if os.geteuid():
        yield
        return
    for path in (folder, *folder.rglob("*")):
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def _intact(whole: pathlib.Path, damaged: str) -> dict[pathlib.Path, bytes]:
    """What must stay: the files of the run, but not those of the damaged checkpoint."""
    unit = whole / damaged
    if "checkpoints" in damaged:
        parts = pathlib.Path(damaged).parts
        unit = whole.joinpath(*parts[: parts.index("checkpoints") + 2])
    paths = [p for p in whole.rglob("*") if p != unit and unit not in p.parents and p.is_file()]
    return {path: path.read_bytes() for path in paths}


def _changed(whole: pathlib.Path, before: dict[pathlib.Path, bytes], command: str) -> list[str]:
    """Files that a command changed; training may write again what describes the run."""
    free = ("run.json", "flags.txt", "tensorboard", "plots", "metrics.jsonl", "/ema/")
    free = {"train": free, "study": ("work/report/",)}.get(command, ())
    changed = [p for p, data in before.items() if not p.is_file() or p.read_bytes() != data]
    names = [str(p.relative_to(whole)) for p in changed]
    return [name for name in names if not any(part in name for part in free)]


def main(argv):
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=pathlib.Path)
    parser.add_argument("--cells", type=int, default=0, help="size of the sample; 0: all cells")
    parser.add_argument("--only", default="", help="part of the name of a file, damage, or command")
    parser.add_argument("--leave_out", default="", help="files to leave out, comma-separated")
    options = parser.parse_args(argv)
    absl.logging.set_verbosity(absl.logging.FATAL)
    session.execute = lambda runs, **_: Outcome({r.name: "not trained here" for r in runs}, 0)
    options.work.mkdir(parents=True, exist_ok=True)
    matrix = Matrix(options.work)
    out = sys.stdout
    left_out = [name for name in options.leave_out.split(",") if name]
    cells = [cell for cell in matrix.cells() if options.only in " ".join(cell)]
    cells = [cell for cell in cells if not any(name in cell[0] for name in left_out)]
    if options.cells:
        cells = random.Random(0).sample(cells, options.cells)
    for cell in cells:
        print(json.dumps(matrix.run_cell(*cell)), file=out, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
