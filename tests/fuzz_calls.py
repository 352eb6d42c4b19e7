"""Random calls of the commands: flags, files, and environment that nobody should use, or might."""

import dataclasses
import os
import pathlib
import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from genai_jax import components, train_tokenizer
from genai_jax.compare import CompareRequest
from genai_jax.compile_check import CheckRequest
from genai_jax.config import LARGEST_INT, plain_type
from genai_jax.coordinate_check import CoordinateRequest
from genai_jax.errors import ConfigError
from genai_jax.fit import FitRequest
from genai_jax.model_card import CardRequest
from genai_jax.scaling.ladder import LadderRequest
from genai_jax.scaling.study.analyses import ANALYSES
from genai_jax.study import StudyRequest
from genai_jax.tasks.registry import TASKS, task_class
from tests.families import taken

COMMANDS = (
    "train", "sample", "evaluate", "fit", "ladder", "study", "compile_check", "train_tokenizer",
    "coordinate_check", "compare", "model_card",
)  # fmt: skip
OF_TEXT = ("ladder", "coordinate_check", "study", "fit", "train_tokenizer", "compare", "model_card")
# Families whose samples are texts.
TEXTUAL = (
    "language_model", "masked_language_model", "discrete_diffusion", "sequence_to_sequence",
    "ngram", "hmm", "responder", "neural_lm", "word_vectors",
)  # fmt: skip
OPTIONAL_OUTPUT = ("sample", "compile_check", "compare", "model_card")
OF_A_WORKDIR = ("sample", "evaluate", "model_card")
OF_A_RUN = ("train", "compile_check", "coordinate_check", "ladder")  # take every flag of a run
# Flags whose value is a number of turns of a loop: a huge one only takes its time.
LOOPS = {
    "steps", "sweeps", "resamples", "seeds", "max_tokens", "num_samples", "likelihood_steps",
    "likelihood_probes", "importance_samples", "batches", "held_out_times", "jobs", "slices",
    "timeout_s", "heartbeat_s", "prefetch", "n_critic", "critic_steps", "columns", "needles",
}  # fmt: skip
TINY_REQUEST = {
    "sample": {"num_samples": 2, "max_tokens": 3, "steps": 2, "sweeps": 2},
    "evaluate": {"batches": 1},
}  # fmt: skip
# Flags that name what is read, with what stands before the path, and those that name a file or
# folder to write.
READ = {
    "data.dataset": "text:", "data.tokenizer": "", "init_from": "", "diffusion.autoencoder": "",
    "code_prior.autoencoder": "", "sampler.weak": "", "few_step.teacher": "", "gan.grow_from": "",
    "autoencoder_loss.perceptual": "", "prompt_file": "", "weak": "", "init_image": "",
    "classifier": "", "inception": "", "latents": "", "csv": "", "study": "", "compare": "",
    "scores": "", "emissions": "", "analogies": "",
}  # fmt: skip
WRITTEN = {"output", "workdir", "program", "dump_shardings"}
# Text that may be anything; all other text means something, so that most of it is refused.
FREE = {
    "prompt", "stop", "data.data_dir", "data.text_key", "data.source_key", "data.target_key",
    "data.image_key", "data.label_key",
    "data.caption_key", "loss_unit", "launcher_options", "name", "license",
    "train.wandb",
}  # fmt: skip
NO_TEXTS = (
    "\u2603 nonsense",
    "1e400",
    "x" * 5000,
    "$\\frac{",
    "\x1b[31mred",
    "no_such_thing",
    "%s{0}",
)
TEXTS = (*NO_TEXTS, "nan", "-1", ",", "a:b:c", "\udcff", "../..", "'", '"', "\u202e", "", " ")
NOT_NUMBERS = ("three", "", "1e", "0x", "\u2603", "1 000", "--1", "1;2", "nan", "None", "true")
BEYOND = (LARGEST_INT + 1, 2**63, -(2**63) - 1, 10**30, -(10**5000) // 10**4990)


class Odd(NamedTuple):
    """Something odd about a call: arguments to add, and whether they must be refused."""

    arguments: tuple[str, ...]
    refused: bool
    names: tuple[str, ...]  # of which an error must say one


class Call(NamedTuple):
    """A call of a command in the folder of all files."""

    command: str
    arguments: list[str]
    environment: dict[str, str | None]  # None removes a variable
    stdin: str = ""  # or "closed"
    stdout: str = ""  # or "closed", "full", "gone"
    fresh: bool = False  # a whole process, for what Python and jax read as they start
    refused: bool = False  # whether it must be
    names: Sequence[str] = ()  # of which an error must say one


class Flag(NamedTuple):
    name: str
    field: dataclasses.Field


def flags_of(parts: Mapping[str, type]) -> list[Flag]:
    return [
        Flag(f.name if name == "run" else f"{name}.{f.name}", f)
        for name, cls in parts.items()
        for f in dataclasses.fields(cls)
    ]


class Calls:
    """Generates calls.

    Args:
      families: name -> flags of a tiny run of it.
      folder: where `write_files` put its files; calls name them relative to it.
      seed: of the calls.
    """

    def __init__(self, families: Mapping[str, Sequence[str]], seed: int):
        self._families, self._rng, self._count = families, random.Random(seed), 0
        self._all = {n: flags_of(components.components_of(task_class(n))) for n in TASKS}

    def plain(self, command: str, family: str) -> Call:
        """A call without anything odd."""
        return Call(command, self._base(command, family), {})

    def next(self) -> Call:
        rng = self._rng
        command = rng.choices(COMMANDS, (20, 10, 6, 3, 4, 4, 8, 4, 1, 2, 2))[0]
        family = self._family(command)
        odds = [self._odd(command, family) for _ in range(rng.choices((1, 2, 3), (6, 3, 1))[0])]
        environment, stdin, stdout, fresh = {}, "", "", False
        if rng.random() < 0.25:
            environment, stdin, stdout, fresh = self._surroundings()
        arguments = [*self._base(command, family), *(a for odd in odds for a in odd.arguments)]
        if any("\0" in argument for argument in arguments):  # which starts no process
            environment, fresh = {}, False
        refused, names = any(odd.refused for odd in odds), [n for odd in odds for n in odd.names]
        return Call(command, arguments, environment, stdin, stdout, fresh, refused, names)

    def _family(self, command: str) -> str:
        if command in OF_TEXT:
            return "language_model"
        cannot = {"sample": "image_classifier", "evaluate": "responder"}.get(command)
        return self._rng.choice([name for name in self._families if name != cannot])

    def _base(self, command: str, family: str) -> list[str]:
        self._count += 1
        place = f"new/{self._count}"
        if command in ("sample", "evaluate"):
            names = {f.name for f in self._flags(command, family)} & {*TINY_REQUEST[command]}
            tiny = [f"--{name}={TINY_REQUEST[command][name]}" for name in sorted(names)]
            suffix = ".txt" if family in TEXTUAL else ".png"
            output = [f"--output={place}{suffix}"] if command == "sample" else []
            return [f"--workdir=runs/{family}", *tiny, *output]
        run = [f"--flagfile=files/{family}.flags"]
        return {
            "train": [*run, f"--workdir={place}"],
            "compile_check": [*run, "--topology=cpu:1", "--compiles=false"],
            "coordinate_check": [*run, f"--output={place}", "--widths=8,16", "--steps=1"],
            "ladder": [*run, "--budgets=1e9", "--widths=32,64",
                       "--least_steps=1", f"--output={place}"],
            "fit": ["--csv=files/runs.csv", "--resamples=3", f"--output={place}"],
            "study": ["--study=files/study", f"--workdir={place}"],
            "compare": [f"runs/{family}", f"--output={place}"],
            "model_card": [f"--workdir=runs/{family}", f"--output={place}.md"],
            "train_tokenizer": ["--vocab_size=300", "--data.dataset=text:files/text",
                                f"--output={place}.json"],
        }[command]  # fmt: skip

    def _flags(self, command: str, family: str) -> list[Flag]:
        if command in ("sample", "evaluate"):
            cls = components.request_class(task_class(family), f"{command}_request")
            distributed = {"distributed": components.DistributedConfig}
            return flags_of({"run": cls} | distributed)
        own = {
            "compile_check": {"run": CheckRequest}, "coordinate_check": {"run": CoordinateRequest},
            "ladder": {"run": LadderRequest}, "fit": {"run": FitRequest},
            "study": {"run": StudyRequest, "study": ANALYSES["curves"].config},
            "compare": {"run": CompareRequest}, "model_card": {"run": CardRequest},
            "train_tokenizer": train_tokenizer.COMPONENTS,
        }  # fmt: skip
        flags = flags_of(own.get(command, {}))
        if command == "train" or (command in OF_A_RUN and self._rng.random() < 0.5):
            taken = {flag.name for flag in flags}
            flags = [f for f in self._all[family] if f.name not in taken]
        return flags

    def _odd(self, command: str, family: str) -> Odd:
        rng = self._rng
        kinds = {
            self._value: 60, self._path: 15, self._unknown: 5, self._of_another_family: 5,
            self._stray: 4, self._task: 4, self._flagfile: 4,
        }  # fmt: skip
        while True:
            odd = rng.choices([*kinds], [*kinds.values()])[0](command, family)
            if odd:
                return odd

    def _value(self, command: str, family: str) -> Odd | None:
        flag = self._rng.choice(self._flags(command, family))
        if flag.name in READ or flag.name in WRITTEN or flag.name in ("task", "train.steps"):
            return None
        text, refused = self._text_for(flag)
        if flag.name == "init_map" and command != "train":  # those need shapes alone
            refused = False
        shown = [f"--{flag.name}={text}"]
        if command == "train" and self._rng.random() < 0.1:
            shown = [f"--{flag.name}", text]
            refused = refused and plain_type(flag.field.type) is not bool
        return Odd(tuple(shown), refused, (flag.name, *([text] if text else [])))

    def _text_for(self, flag: Flag) -> tuple[str, bool]:
        """(a value, whether it must be refused)"""
        rng, meta = self._rng, flag.field.metadata
        kind, low, high = plain_type(flag.field.type), meta["minimum"], meta["maximum"]
        if meta["choices"]:
            if rng.random() < 0.5:
                return rng.choice(("nonsense", "", meta["choices"][0].upper() + "X", "0")), True
            return rng.choice(meta["choices"]), False
        if kind is bool:
            if rng.random() < 0.5:
                return rng.choice(("maybe", "", "2", "nan")), True
            return rng.choice(("true", "false", "1", "0")), False
        if kind is str:
            if flag.name in FREE or flag.name.startswith("study.") or rng.random() < 0.5:
                return rng.choice(TEXTS), False
            return rng.choice(NO_TEXTS), True
        bad = list(NOT_NUMBERS) if kind is int else [n for n in NOT_NUMBERS if n != "0x"]
        bad += ["1.5", "inf", "1e400"] if kind is int else ["inf", "-inf", "1e400"]
        if low is not None:
            bad += [str(low - 1), str(-7 if low > -7 else low - 1)] * 2
        if high is not None:
            bad += [str(high + 1), str(high * 2 + 1)] * 2
        elif kind is int:
            bad += [str(number) for number in BEYOND]
        if rng.random() < 0.7:
            return rng.choice(bad), True
        good = [str(x) for x in (low, high) if x is not None and x != float("inf")]
        if kind is int:
            good += ["0", "1", "2", "3", "5", "7", "0x3", " 3", "+2", "1_1"]
            if high is None and flag.name.rpartition(".")[2] not in LOOPS:
                good += [str(LARGEST_INT), str(LARGEST_INT // 2 + 1)]
        else:
            good += ["0", "1", "1e-400", "1e-45", "-0.0", "1e30", "3.5e38", "1.7e308", "0.5", "2"]
        return rng.choice(good), False

    def _path(self, command: str, family: str) -> Odd | None:
        rng = self._rng
        named = [f.name for f in self._flags(command, family) if f.name in {*READ, *WRITTEN}]
        if command in ("sample", "evaluate", "study", "fit", "model_card"):
            named += ["workdir" if command != "fit" else "csv"] * 2
        if not named:
            return None
        name = rng.choice(named)
        long = "x" * rng.choice((300, 5000))
        before = READ.get(name, "")
        if name in WRITTEN and not (name == "workdir" and command in OF_A_WORKDIR):
            path, refused = rng.choice((
                ("", name == "workdir" or command not in OPTIONAL_OUTPUT),
                ("nul\0", True), (f"new/{long}", True), ("files/text.txt/x", True),
                ("/proc/no/such", True), ("files/fifo/x", True), ("new/\u2603 [1]", False),
                ("new/a b", False), ("new/$x$", False), ("new/\udcff", False),
                ("files/loop/x", True), ("new/\x1b[31m", False), ("files/fifo", False),
            ))  # fmt: skip
            if "\u2603" not in path and command == "train_tokenizer" and path:
                path += ".json"
            if name == "workdir" and command not in ("train", "study"):
                refused = False  # nothing is written there
            return Odd((f"--{name}={path}",), refused, (name, path))
        path = rng.choice((
            "files/missing", "files/empty", "files/cut", "files/fifo", "files/folder", "files/loop",
            "files/binary", "nul\0", "files/text.txt/x", "/dev/zero", "/proc/self/mem", long,
            "~nobody_x/y", "files/huge", "",
        ))  # fmt: skip
        if name == "data.dataset" and rng.random() < 0.3:
            before = "images:"
        # Shapes alone need no other run, and images no tokenizer; any bytes can be a text.
        read = command not in OF_A_RUN[1:] and name != "sampler.weak"
        read = read and (name != "data.tokenizer" or family in TEXTUAL)
        read = read and (before != "text:" or path != "files/binary")
        return Odd((f"--{name}={before}{path}",), read and bool(path), (name, path, before + path))

    def _unknown(self, command: str, family: str) -> Odd:
        name = self._rng.choice(self._flags(command, family)).name
        cut = name[:-2] + "xq"
        argument = self._rng.choice((
            f"--{cut}=1", f"--{name}.x=1", "--=1", "---x=1", f"--{name.upper()}Q=2", "--x y=1",
            f"--no{cut}=1", "--\u2603=1",
        ))  # fmt: skip
        return Odd((argument,), True, (argument.lstrip("-").split("=")[0], argument))

    def _of_another_family(self, command: str, family: str) -> Odd | None:
        other = self._rng.choice([name for name in TASKS if name != family])
        taken = {flag.name for flag in self._all[family]}
        foreign = [f.name for f in self._all[other] if f.name not in taken]
        name = self._rng.choice(foreign) if foreign else None
        return Odd((f"--{name}=1",), True, (name,)) if name else None

    def _stray(self, command: str, family: str) -> Odd:
        word = self._rng.choice(("stray", "", "a=b", "\x1b[31m", "files/vae.flags", "-1 "))
        return Odd((word,), True, (word, repr(word), "argument", "is not a flag"))

    def _task(self, command: str, family: str) -> Odd | None:
        if command in ("fit", "study", "train_tokenizer", "compare", "model_card"):
            return None
        task = self._rng.choice((
            "poetry", "", "no_such_module_x:Task", "tests.outside_tasks_broken:Task", "GAN", ":x",
            "a:b:c", "tests.outside_tasks:Incomplete", "os:path", "json:", "genai_jax.errors:No",
            "nul\0", "language_model ",
        ))  # fmt: skip
        return Odd((f"--task={task}",), bool(task), ("task",))

    def _flagfile(self, command: str, family: str) -> Odd | None:
        path = self._rng.choice((
            "files/missing", "files/empty", "files/cut", "files/fifo", "files/folder", "files/loop",
            "files/binary", "nul\0", "/dev/zero", "files/circle.flags", "files/text.txt",
            "files/nul.flags", "", "x" * 5000,
        ))  # fmt: skip
        return Odd((f"--flagfile={path}",), True, ("flagfile", "NUL"))

    def _surroundings(self) -> tuple[dict[str, str | None], str, str, bool]:
        rng = self._rng
        if rng.random() < 0.4:
            streams = (("closed", ""), ("", "closed"), ("", "full"), ("", "gone"), ("closed",) * 2)
            return {}, *rng.choice(streams), False
        name, values, fresh = rng.choice((
            ("LC_ALL", ("C", "POSIX", "xx_YY", "\u2603"), True),
            ("PYTHONIOENCODING", ("ascii", "latin-1", "ascii:strict"), True),
            ("JAX_NUM_CPU_DEVICES", ("2", "3", "8"), False),
            ("JAX_NUM_CPU_DEVICES", ("0", "-1", "many", ""), True),
            ("NPROC", ("0", "-1", "many", "", "1"), True),
            ("TERM", ("dumb", "", "\u2603", None), False),
            ("COLUMNS", ("0", "-1", "many", "1", "99999999999"), False),
            ("HOME", (None, "", "/no/such"), False), ("HOME", (None, "/proc"), True),
            ("TMPDIR", ("/no/such", ""), False), ("USER", (None,), False),
            ("SLURM_JOB_ID", ("1", "many"), False), ("SLURM_NTASKS", ("many", "-1"), False),
            ("JAX_COMPILATION_CACHE_DIR", ("files/text.txt", "/proc/x", "nul"), False),
            ("PYTHONOPTIMIZE", ("2",), True), ("MPLBACKEND", ("TkAgg", "no_such"), True),
        ))  # fmt: skip
        return {name: rng.choice(values)}, "", "", fresh


def write_files(folder: pathlib.Path, families: Mapping[str, Sequence[str]]):
    """What the calls name in their folder."""
    files = folder / "files"
    for name in ("files/text", "files/folder", "files/study", "new", "runs"):
        (folder / name).mkdir(parents=True)
    for number in range(40):
        text = " ".join(str(number * other) for other in range(200))
        (files / "text" / f"{number}.txt").write_text(text)
    write = lambda name, text: (files / name).write_text(text)
    write("text.txt", "some words of text\n" * 50)
    write("empty", "")
    write("cut", '{"model": {"type": "BPE", "vo')
    (files / "binary").write_bytes(bytes(range(256)) * 9)
    os.mkfifo(files / "fifo")
    (files / "loop").symlink_to(files / "loop")
    with open(files / "huge", "wb") as file:
        file.truncate(1 << 40)
    write("circle.flags", "--flagfile=circle.flags\n")
    write("nul.flags", '--seed:="\\u0000"\n')
    for name, flags in families.items():
        write(f"{name}.flags", "\n".join(flags) + "\n")
    rows = [f"{n},{20 * n * k},{2 + 50 / n**0.3 + 90 / (20 * n * k) ** 0.3}"
            for n in (1e6, 2e6, 4e6, 8e6, 16e6) for k in (0.5, 1, 2, 4)]  # fmt: skip
    write("runs.csv", "\n".join(["parameters,tokens,loss", *rows]) + "\n")
    for seed in (1, 2):
        write(f"study/{seed}.flags", f"--flagfile=../language_model.flags\n--seed={seed}\n")
    write("study/study.flags", "--study.analysis=curves\n")
    write("study/README.md", "# A tiny study\n\nDoes it read its files?\n")


def families_of(names: Sequence[str], all_families: Mapping[str, Any]) -> dict[str, list[str]]:
    """Name -> flags of one step of a tiny run."""
    if missing := {*names} - {*all_families}:
        raise ConfigError(f"no such families: {', '.join(missing)}")
    once = (
        "--train.steps=1", "--eval.batches=1", "--train.progress=false", "--data.batch_size=8",
        "--optimizer.warmup_steps=0", "--optimizer.schedule=constant", "--checkpoint.every=0",
    )  # fmt: skip
    more = {"gan": ("--gan.r1_every=1", "--gan.path_length_every=1")}
    return {
        name: [*all_families[name], *taken(task_class(name), once), *more.get(name, ())]
        for name in names
    }
