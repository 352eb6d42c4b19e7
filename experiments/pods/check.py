"""Compiles the experiments in this folder for their slices and writes the table in README.md.

    python experiments/pods/check.py [NAME ...]   # these flagfiles, or all if none is named
    python experiments/pods/check.py --table      # compiles nothing, uses the stored step times

The output of compile_check is stored next to each flagfile as text (NAME.txt) and JSON (NAME.json).
"""

import json
import os
import pathlib
import re
import subprocess
import sys
from typing import NamedTuple

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
GIB = 2**30
sys.path.insert(0, str(ROOT))
from genai_jax.components import parse_run  # noqa: E402
from genai_jax.networks.sequence.flops import transformer_forward_flops  # noqa: E402
from genai_jax.scaling.chips import Topology  # noqa: E402
from genai_jax.scaling.compile_text import as_text  # noqa: E402
from genai_jax.scaling.whole_run import hours_text, time_text, whole_run  # noqa: E402


class Published(NamedTuple):
    """What MaxText, the leading public JAX trainer, reports for a model and chip.

    From docs/reference/models/tiering.md in its repository, as of 2026.

    Attributes:
      mfu: model FLOPs utilization as reported.
      attention: how its FLOPs count attention: "in full", as if no pair were masked, or "unknown".
    """

    mfu: float
    attention: str


PUBLISHED = {
    "llama3_8b_v6e_256": Published(0.4546, "in full"),
    "llama3_70b_v6e_256": Published(0.5033, "in full"),
    "llama2_70b_v5p_512": Published(0.654, "unknown"),
}
MFU = 0.4  # assumed for a run that does not fit
COLUMNS = (
    "experiment",
    "slice",
    "mesh",
    "tokens per chip",
    "memory GiB",
    "step s",
    "MFU",
    "published",
    "steps",
    "whole run",
    "chip-hours",
)


def main(arguments: list[str]) -> int:
    names = [a.removesuffix(".flags") for a in arguments if not a.startswith("-")]
    failed = []
    if "--table" not in arguments:
        for flagfile in experiments():
            if not names or flagfile.stem in names:
                failed += [] if check(flagfile) else [flagfile.stem]
    for flagfile in experiments():
        if flagfile.with_suffix(".json").exists():
            cost(flagfile)
    write_between(HERE / "README.md", "experiments", table())
    if failed:
        print(f"did not compile: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


def experiments() -> list[pathlib.Path]:
    """The flagfiles that name a topology."""
    return [path for path in sorted(HERE.glob("*.flags")) if topology_of(path)]


def topology_of(flagfile: pathlib.Path) -> str:
    """The topology in the comment ``# topology:`` of a flagfile; empty if there is none."""
    comment = re.search(r"^# topology: *(\S+)", flagfile.read_text(), re.MULTILINE)
    return comment[1] if comment else ""


def check(flagfile: pathlib.Path) -> bool:
    """Compiles one experiment; returns whether that worked, even if the program does not fit."""
    print(f"{flagfile.stem} for {topology_of(flagfile)} ...", flush=True)
    done = compile_check(
        f"--flagfile={flagfile.relative_to(ROOT)}",
        f"--topology={topology_of(flagfile)}",
        f"--output={flagfile.with_suffix('.json')}",
    )
    if done.returncode not in (0, 1) or not done.stdout:
        print(done.stderr[-2000:], file=sys.stderr)
        return False
    flagfile.with_suffix(".txt").write_text(done.stdout)
    print(done.stdout.splitlines()[-1], flush=True)
    return True


def cost(flagfile: pathlib.Path):
    """Stores what the whole run costs, by its flagfile's steps and the stored time of a step."""
    numbers = flagfile.with_suffix(".json")
    report = json.loads(numbers.read_text())
    os.chdir(ROOT)  # paths in flagfiles are relative to it
    name = str(flagfile.relative_to(ROOT))
    config = parse_run([f"--flagfile={name}"])
    topology = Topology(report["topology"], report["slices"])
    report["run"] = whole_run(report, config.train.steps, config.run.dtype, topology, MFU)
    numbers.write_text(json.dumps(report, indent=1) + "\n")
    flagfile.with_suffix(".txt").write_text(as_text(name, report) + "\n")


def compile_check(*flags: str) -> subprocess.CompletedProcess:
    """Runs the command with the compilers of `make targets` on its path."""
    compilers = pathlib.Path(sys.prefix) / "targets"
    path = os.pathsep.join((str(compilers), os.environ.get("PYTHONPATH", "")))
    command = (sys.executable, "-m", "genai_jax.compile_check", *flags)
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )


def table() -> str:
    """The table of all experiments, from their JSON files."""
    rows = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for flagfile in experiments():
        numbers = flagfile.with_suffix(".json")
        if numbers.exists():
            rows.append(
                "| " + " | ".join(row(flagfile.stem, json.loads(numbers.read_text()))) + " |"
            )
        else:
            rows.append(f"| {flagfile.stem} | {topology_of(flagfile)} | not compiled yet |")
    return "\n".join(rows)


def row(name: str, report: dict) -> list[str]:
    mesh = " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
    tokens = report["tokens_per_step"]
    per_chip = (tokens or report["batch_size"]) / report["devices"]
    what = "" if tokens else " images"
    cells = [f"[{name}]({name}.txt)", report["topology"], mesh, f"{per_chip:,.0f}{what}"]
    published = published_text(name)
    run = report["run"]
    price = run.get("predicted", run.get("assumed"))
    whole = [f"{run['steps']:,}", time_text(price["seconds"]), hours_text(price["chip_hours"])]
    if not report["fits"]:
        why = f"does not fit: {report['largest'][0]}"
        return [*cells, why, "", "", published, whole[0], "", ""]
    memory = f"{report['memory']['total'] / GIB:.1f} of {report['capacity'] / GIB:.1f}"
    predicted = report["predicted"]
    return [
        *cells,
        memory,
        f"{predicted['step_seconds']:.2f}",
        f"{predicted['mfu']:.1%}",
        published,
        *whole,
    ]


def published_text(name: str) -> str:
    """The published MFU in our convention, and as reported if that is another; empty if none is."""
    if name not in PUBLISHED:
        return ""
    reported = PUBLISHED[name]
    if reported.attention == "unknown":
        return f"{reported.mfu:.1%} as reported"
    return f"{in_our_convention(name):.1%} ({reported.mfu:.1%} reported)"


def in_our_convention(name: str) -> float:
    """A published MFU that counts attention in full, with causal attention halved."""
    config = parse_run([f"--flagfile={(HERE / name).relative_to(ROOT)}.flags"])
    vocabulary = config.language_model.vocab_size
    parts = transformer_forward_flops(config.transformer, vocabulary, config.data.sequence_length)
    halved = sum(parts.values())
    return PUBLISHED[name].mfu * halved / (halved + parts["attention"])


def write_between(path: pathlib.Path, name: str, text: str):
    """Replaces the text between ``<!-- name -->`` and ``<!-- end of name -->``."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, rest = path.read_text().split(begin)
    path.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
