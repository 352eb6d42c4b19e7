"""The fenced blocks of README.md and docs/, and how tests execute them.

`python -m tests.docs_blocks` prints how many there are and how many are executed.

A block of commands begins with ```bash, one of Python with ```python, a flagfile with ```flags, and
output with ```text or nothing. A comment above a block, <!-- not run: REASON -->, keeps it from
being executed: then its flags are checked and its syntax parsed. A comment <!-- setup: COMMAND -->
stands for what a reader has done on another page. Training is made short, as `shrunk` says; its
flags are parsed as they are.
"""

import collections
import contextlib
import dataclasses
import importlib
import os
import pathlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from genai_jax import components
from genai_jax.tasks.registry import task_class
from tests.commands import environment
from tests.conftest import ROOT
from tests.families import taken

# Pages whose blocks another test executes, all of them.
ELSEWHERE = {
    "docs/your_own_text.md": "tests/test_own_text.py",
    "docs/your_own_pictures.md": "tests/test_own_pictures.py",
    "docs/your_own_code.md": "tests/test_own_code.py",
    "docs/your_own_family.md": "tests/test_outside_family.py",
    "docs/python.md": "tests/test_python_guide.py",
}
PAGES = ("README.md", *(p.relative_to(ROOT).as_posix() for p in sorted(ROOT.glob("docs/**/*.md"))))
# Pages of the site and of the repository whose commands are only checked.
STUDIES = (p.relative_to(ROOT).as_posix() for p in sorted(ROOT.glob("experiments/**/README.md")))
BESIDE = (
    "BUILD_NOTES.md",
    "CONTRIBUTING.md",
    "colabs/README.md",
    "kernels_pallas/README.md",
    *STUDIES,
)
NOT_RUN = re.compile(r"<!-- not run: (.+) -->")
SETUP = re.compile(r"<!-- setup: (.+) -->")
NAMED = re.compile(r"\*\*`([^`]+)`\*\*")
# What would take minutes as the page has it, for each kind of run; "TASK NETWORK" goes first.
SMALL = {
    "language_model": "transformer.num_layers=2 transformer.embed_dim=16 transformer.num_heads=2 "
    "data.sequence_length=32 transformer.scan_layers=true optimizer.name=adamw",
    "masked_language_model": "transformer.num_layers=1 transformer.embed_dim=16 "
    "transformer.num_heads=2 data.sequence_length=32 optimizer.name=adamw",
    "discrete_diffusion": "transformer.num_layers=1 transformer.embed_dim=16 "
    "transformer.num_heads=2 data.sequence_length=32 optimizer.name=adamw",
    "sequence_to_sequence recurrent": "recurrent.hidden_dim=8",
    "sequence_to_sequence transformer": "transformer.num_layers=1 transformer.embed_dim=16 "
    "transformer.num_heads=2 sequence_to_sequence.encoder_layers=1 optimizer.name=adamw",
    "code_prior": "transformer.num_layers=1 transformer.embed_dim=16 transformer.num_heads=2",
    "diffusion unet": "unet.channels=8 unet.head_dim=8 unet.channel_multipliers=1",
    "diffusion dit": "dit.num_layers=1 dit.embed_dim=16 dit.num_heads=2 dit.patch_size=4 "
    "dit.scan_layers=true",
    "autoencoder": "autoencoder.channels=4 quantizer.codes=16",
    "image_classifier": "classifier.channels=4 classifier.num_stages=1",
    "vae": "ladder_vae.stages=1x1,8x1 ladder_vae.channels=4 ladder_vae.latent_channels=2",
    "gan": "generator.channels=4 critic.channels=4 gan.r1=0",
    "normalizing_flow": "glow.levels=1 glow.steps_per_level=1 glow.hidden_channels=4",
    "ngram": "ngram.max_entries=50000",
    "hmm": "hmm.states=3 hmm.iterations=2",
    "neural_lm": "neural_lm.hidden_dim=8",
    "word_vectors": "word_vectors.dim=8",
    "rbm": "rbm.num_hidden=5 rbm.chains=8 rbm.sweeps=1 rbm.ais_chains=4 rbm.ais_temperatures=5",
}
ALWAYS = (
    "train.steps=2 eval.batches=1 data.batch_size=8 optimizer.warmup_steps=0 train.progress=false"
)
# Of samples and scores: more than this is lowered.
FEW = {"num_samples": 6, "max_tokens": 3, "steps": 2, "sweeps": 2, "batches": 1,
       "importance_samples": 2, "resamples": 5, "likelihood_steps": 1}  # fmt: skip
OWN_PROCESS = ("compile_check", "study")  # they configure jax before it starts


@dataclasses.dataclass(frozen=True)
class Block:
    page: str
    line: int
    kind: str
    text: str
    not_run: str = ""  # the reason
    name: str = ""  # of the file that it shows

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str) -> list[Block]:
    """The blocks of a page, and its setups as blocks of commands."""
    blocks, inside, about = [], None, {}
    start, kind = 0, ""
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), 1):
        if inside is not None and line != "```":
            inside.append(line)
        elif inside is not None:
            blocks.append(Block(page, start, kind, "\n".join(inside) + "\n", **about))
            inside, about = None, {}
        elif line.startswith("```"):
            inside, start, kind = [], number, line[3:]
        elif match := SETUP.fullmatch(line):
            blocks.append(Block(page, number, "bash", match[1] + "\n"))
        elif match := NOT_RUN.fullmatch(line):
            about = {"not_run": match[1]}
        elif match := NAMED.match(line):
            about = {"name": match[1]}
        elif line and not line.startswith(("<!--",)) and "name" not in about:
            about = {}
    return blocks


def commands_of(block: Block) -> list[str]:
    """Its commands, without comments."""
    text = block.text.replace("\\\n", " ")
    lines = (re.sub(r"\s+#.*$", "", line).strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def execute(page: str, folder: pathlib.Path):
    """Executes the blocks of a page, in order, in a folder that has the experiments.

    Raises:
      AssertionError: a command failed; it names the block.
    """
    names: dict[str, Any] = {}
    (folder / "experiments").symlink_to(ROOT / "experiments")
    with contextlib.chdir(folder):
        for block in blocks_of(page):
            if block.name:
                path = folder / block.name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.text, encoding="utf-8")
            elif block.not_run:
                check_names(block)
            elif block.kind == "python":
                exec(compile(block.text, str(block), "exec"), names)
            elif block.kind == "bash":
                for command in commands_of(block):
                    run(command, block)


def run(command: str, block: Block):
    """Runs one command: in this process if that is possible, since imports take seconds."""
    words = shlex.split(command)
    output = None
    if ">" in words:
        output = words[words.index(">") + 1]
        words = words[: words.index(">")]
    settings = list(_settings(words))
    python, dash, module, *flags = words[len(settings) :]
    assert (python, dash) == ("python", "-m"), f"{block}: only Python modules are run"
    command = module.removeprefix("genai_jax.")
    arguments = shrunk(command, flags)
    if settings or command in OWN_PROCESS:
        variables = environment() | dict(s.split("=", 1) for s in settings)
        call = [sys.executable, "-m", module, *arguments]
        result = subprocess.run(call, env=variables, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, f"{block}: {command}\n{result.stdout}{result.stderr}"
        return
    with contextlib.ExitStack() as stack:
        if output:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(output, "w"))))
        assert importlib.import_module(module).main(arguments) == 0, f"{block}: {command}"


def _settings(words: Sequence[str]) -> Iterator[str]:
    """The variables before a command."""
    for word in words:
        if not re.fullmatch(r"[A-Z_]+=.*", word):
            return
        yield word


def shrunk(command: str, flags: Sequence[str]) -> list[str]:
    """The arguments of a command with what makes it short; flags of the page stay as they are."""
    flags = [flag if "=" in flag or not flag.startswith("--") else f"{flag}=true" for flag in flags]
    if "--help=true" in flags:
        return [flag.replace("--help=true", "--help") for flag in flags]
    given = {flag.partition("=")[0].removeprefix("--") for flag in flags}
    if command in ("train", "compile_check") and "--compiles=false" not in flags:
        config = components.parse_run(
            [f for f in flags if "." in f.partition("=")[0] or f.startswith("--flagfile")]
        )
        task, values = config.run.task, config.items()
        network = values.get(f"{task}.network", values.get("diffusion.network", ""))
        kind = "diffusion" if task == "few_step" else task
        small = SMALL.get(f"{kind} {network}") or SMALL.get(kind, "")
        small = [*small.split(), *taken(task_class(task), ALWAYS.split())]
        return [*flags, *(f"--{s}" for s in small if s.partition("=")[0] not in given)]
    shown = dict(flag.removeprefix("--").partition("=")[::2] for flag in flags)
    return [*flags, *(f"--{n}={few}" for n, few in _few(command, shown).items())]


def _few(command: str, shown: dict[str, str]) -> dict[str, int]:
    """Numbers to lower, of those that the command has."""
    if command not in ("sample", "evaluate"):
        return {n: few for n, few in FEW.items() if n in shown and int(shown[n]) > few}
    task = task_class(components.recorded_task(shown["workdir"]))
    fields = dataclasses.fields(components.request_class(task, f"{command}_request"))
    few = FEW | ({"num_samples": 20} if command == "evaluate" else {})
    unset = ("importance_samples", "likelihood_steps")  # which ask for more, where they are set
    if command == "evaluate" and "classifier" not in shown:
        unset += ("num_samples", "steps", "sweeps")
    return {
        f.name: few[f.name]
        for f in fields
        if f.name in few
        and (int(shown[f.name]) > few[f.name] if f.name in shown else f.name not in unset)
    }


def check_names(block: Block):
    """Of a block that is not run: its syntax, and that its commands have the flags it names."""
    if block.kind == "python":
        compile(block.text, str(block), "exec")
        return
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    for command in commands_of(block):
        words = shlex.split(command, comments=True)
        modules = [w for w in words if w.startswith("genai_jax.")]
        for module in modules:
            known = flags_of_command(module)
            named = {w[2:].partition("=")[0] for w in words[words.index(module) :] if w[:2] == "--"}
            assert named <= known, f"{block}: {module} has no {named - known}"
            paths = (w.partition("=")[2] for w in words if w.startswith(("--flagfile", "--study")))
            assert all((ROOT / p).exists() or pathlib.Path(p).exists() for p in paths), (
                f"{block}: a path is missing"
            )


def flags_of_command(module: str) -> set[str]:
    """Names of the flags of a command, of all tasks."""
    if module.removeprefix("genai_jax.") in ("train", "compile_check", "sample", "evaluate"):
        return all_flags()
    return set(_named(importlib.import_module(module))) | {"help", "flagfile"}


def all_flags() -> set[str]:
    """Names of all flags of all commands and tasks."""
    from genai_jax.scaling.study.analyses import ANALYSES
    from genai_jax.tasks.registry import TASKS

    names = {"help", "flagfile"}
    for task in TASKS:
        cls = task_class(task)
        parts = dict(components.components_of(cls))
        for kind in ("sample_request", "evaluate_request"):
            with contextlib.suppress(ValueError):
                request = components.request_class(cls, kind)
                names |= {f.name for f in dataclasses.fields(request)}
        names |= {
            f.name if part == "run" else f"{part}.{f.name}"
            for part, component in parts.items()
            for f in dataclasses.fields(component)
        }
    for path in (ROOT / "genai_jax").glob("*.py"):
        if '__name__ == "__main__"' in path.read_text(encoding="utf-8"):
            names |= set(_named(importlib.import_module(f"genai_jax.{path.stem}")))
    for analysis in ANALYSES.values():
        names |= {f"study.{f.name}" for f in dataclasses.fields(analysis.config)}
    return names | {"study.analysis"}


def _named(module: Any) -> Iterator[str]:
    """The fields of the requests that a command's module has, and of the parts it takes."""
    for name, value in vars(module).items():
        if dataclasses.is_dataclass(value) and name.endswith(("Request", "TokenizerConfig")):
            yield from (f.name for f in dataclasses.fields(value))
        if name == "TextConfig":
            yield from (f"data.{f.name}" for f in dataclasses.fields(value))


def main() -> None:
    count: collections.Counter = collections.Counter()
    for page in PAGES:
        for block in blocks_of(page):
            if block.kind not in ("bash", "python"):
                continue
            commands = len(commands_of(block)) if block.kind == "bash" else 1
            count[f"{block.kind} {'marked' if block.not_run else 'executed'}"] += commands
            if block.not_run:
                print(f"{block}: {block.not_run}")
    print({name: count[name] for name in sorted(count)})
    done = sum(n for name, n in count.items() if name.endswith("executed"))
    print(f"executed: {done} of {count.total()}, {done / count.total():.0%}")


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
