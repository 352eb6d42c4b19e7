"""Kills training with SIGKILL at random moments, and looks for a value that differs.

    python -m tests.kill [--runs=100] [--seed=0] [--families=language_model,gan]

Every family trains a tiny model, whose process is killed, resumed, and killed again, a third of the
times while a checkpoint is being written, until it comes to its end. Then all that it logged (but
times) and the checksums of its last state must be those of a run that nobody killed. `--runs` is
the number of processes that are killed. Prints one line for each run that came to its end, and a
summary.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import sys
import tempfile
import time
from typing import NamedTuple

from genai_jax.tasks.registry import task_class
from tests.commands import TINY
from tests.families import taken
from tests.lives import Life, Lives
from tests.tasks.eight_devices import TASK_FLAGS

STEPS = 24
COMMON = (
    "--data.batch_size=8", "--ema.decay=0.9", "--optimizer.warmup_steps=0",
    "--optimizer.schedule=constant", "--train.progress=false", "--train.log_every=1",
    f"--train.steps={STEPS}", "--eval.every=5", "--eval.batches=1", "--checkpoint.every=2",
)  # fmt: skip
CODES = (
    "--task=autoencoder", "--autoencoder.channels=4", "--autoencoder.channel_multipliers=1,1,1",
    "--autoencoder.latent=rvq", "--quantizer.codebooks=2", "--quantizer.codes=8",
)  # fmt: skip
TEXT = ("--data.sequence_length=32", "--data.dataset=text:{folder}/text")
FAMILIES = {
    "language_model": (*TINY, "--transformer.dropout=0.1", "--data.dataset=text:{folder}/text"),
    "masked_language_model": (*TINY, "--task=masked_language_model", "--masked.span_length=3"),
    "discrete_diffusion": (
        *TINY, "--task=discrete_diffusion", "--discrete_diffusion.block_size=8",
    ),
    "sequence_to_sequence": (*TINY, "--task=sequence_to_sequence"),
    "diffusion": TASK_FLAGS["unet_class"],
    "few_step": TASK_FLAGS["shortcut"],
    "autoencoder": CODES,
    "code_prior": (
        "--task=code_prior", "--code_prior.condition=class", "--transformer.num_layers=1",
        "--transformer.embed_dim=8", "--transformer.num_heads=1",
        "--code_prior.autoencoder={folder}/autoencoder/whole",
    ),
    "image_classifier": TASK_FLAGS["classifier"],
    "vae": TASK_FLAGS["ladder"],
    "gan": TASK_FLAGS["gan"],
    "normalizing_flow": TASK_FLAGS["flow"],
    "rbm": TASK_FLAGS["rbm"],
    "ngram": ("--task=ngram", "--ngram.max_entries=50000", *TEXT),
    "hmm": ("--task=hmm", "--hmm.states=4", "--hmm.iterations=5", *TEXT),
    "neural_lm": (*TASK_FLAGS["neural_lm"], "--data.dataset=text:{folder}/text"),
    "word_vectors": TASK_FLAGS["skip_gram"],
    "responder": ("--task=responder",),
}  # fmt: skip
PATIENCE_S = 300  # for one process


class Summary(NamedTuple):
    kills: int
    while_saving: int
    runs: int  # that came to their end
    compared: int  # values
    differ: int

    def __str__(self):
        return (
            f"{self.kills} kills, {self.while_saving} of them while saving, in {self.runs} runs: "
            f"{self.compared} values compared, {self.differ} that differ"
        )


def logged(workdir: pathlib.Path) -> dict[tuple, float]:
    """What a run leaves: the values of its metrics, and the checksums of its last checkpoint."""
    values = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name in row:
            if not name.startswith("perf/"):
                values[row["step"], name] = row[name]
    sums = workdir / "checkpoints" / str(STEPS) / "checksums" / "metadata"
    for name, value in json.loads(sums.read_text()).items():
        if name != "clock":
            values["checksum", name] = value
    return values


class Family:
    """The runs of one family, one after another."""

    def __init__(self, name: str, folder: pathlib.Path, lives: Lives):
        self.name, self._lives, self._folder = name, lives, folder / name
        common = taken(task_class(name), COMMON)
        self._flags = [flag.format(folder=folder) for flag in (*FAMILIES[name], *common)]
        began = time.monotonic()
        self._to_its_end(self._folder / "whole")
        self._seconds = time.monotonic() - began  # of a whole run
        self._expected = logged(self._folder / "whole")
        self.runs = self.compared = self.differ = 0
        self._kills = 0  # of the present run

    @property
    def _workdir(self) -> pathlib.Path:
        return self._folder / str(self.runs)

    def kill(self, rng: random.Random, saving: bool) -> str | None:
        """Starts the run and kills it; returns when, or None if it came to its end before."""
        before = set(_temporary(self._workdir))
        life = self._lives.start(f"--workdir={self._workdir}", *self._flags)
        if saving:
            self._wait_for_save(life, before, rng)
        elif rng.random() < 0.2:
            _wait(life, seconds=rng.uniform(0, self._seconds))
        else:
            self._wait_for_rows(life, rng)
        if life.ended():
            code, said = life.wait()
            self._check(code, said)
            self._finish()
            return None
        os.kill(life.process, signal.SIGKILL)
        code, said = life.wait()
        if code != -signal.SIGKILL:  # it ended at the same moment
            self._check(code, said)
            self._finish()
            return None
        self._kills += 1
        during = _temporary(self._workdir)
        return "saving" if saving and during else "other"

    def end(self):
        """Lets the present run go on to its end."""
        if self._kills:
            self._to_its_end(self._workdir)
            self._finish()

    def _wait_for_save(self, life: Life, before: set[str], rng: random.Random):
        """Until a checkpoint is being written, perhaps not the first one."""
        temporary = lambda: _temporary(self._workdir)
        for _ in range(rng.randint(1, 3)):
            # What the process before left is removed, or has another name.
            _wait(life, lambda left=before: not left & set(temporary()))
            _wait(life, temporary)
            before = set(temporary())
        _wait(life, seconds=rng.uniform(0, 0.01))

    def _wait_for_rows(self, life: Life, rng: random.Random):
        path, more = self._workdir / "metrics.jsonl", rng.randint(1, 8)
        size = lambda: path.stat().st_size if path.exists() else 0
        begun = time.time()
        # The file is touched when it is opened, then cut to the checkpoint.
        _wait(life, lambda: path.exists() and path.stat().st_mtime > begun)
        start = size()
        _wait(life, lambda: size() >= start + more * 200)
        _wait(life, seconds=rng.uniform(0, 0.05))

    def _to_its_end(self, workdir: pathlib.Path):
        self._check(*self._lives.start(f"--workdir={workdir}", *self._flags).wait())

    def _check(self, code: int, said: str):
        if code:
            raise SystemExit(f"{self.name} ended with exit code {code}:\n{said}")

    def _finish(self):
        got = logged(self._workdir)
        names = got.keys() | self._expected.keys()
        differ = [name for name in names if got.get(name) != self._expected.get(name)]
        print(f"{self.name}: {self._kills} kills, {len(names)} values, {len(differ)} that differ",
              *sorted(map(str, differ))[:5], flush=True)  # fmt: skip
        self.compared, self.differ = self.compared + len(names), self.differ + len(differ)
        self.runs, self._kills = self.runs + 1, 0


def _temporary(workdir: pathlib.Path) -> list[str]:
    """The checkpoints that are being written."""
    try:
        return [name for name in os.listdir(workdir / "checkpoints") if not name.isdigit()]
    except FileNotFoundError:
        return []


def _wait(life: Life, condition=lambda: False, seconds: float = PATIENCE_S):
    """Until the condition holds, the process has ended, or the time is over."""
    deadline = time.monotonic() + seconds
    while not condition() and not life.ended() and time.monotonic() < deadline:
        time.sleep(0.0005)
    if seconds == PATIENCE_S and time.monotonic() > deadline:
        raise SystemExit(f"process {life.process} hangs")


def kill_many(kills: int, names: list[str], seed: int, folder: pathlib.Path) -> Summary:
    """Kills so many processes of these families in turn, and compares all runs at their ends."""
    rng, moments = random.Random(seed), []
    (folder / "text").mkdir()
    for number in range(40):  # quicker to read than an embedded text
        text = " ".join(str(number * other) for other in range(200))
        (folder / "text" / f"{number}.txt").write_text(text)
    needed = {"autoencoder"} if "code_prior" in names else set()
    names = sorted(needed | {*names}, key=list(FAMILIES).index)
    with Lives(names) as lives:
        families = [Family(name, folder, lives) for name in names]
        while len(moments) < kills:
            family = families[len(moments) % len(families)]
            saving = 3 * moments.count("saving") <= len(moments)
            moments += filter(None, [family.kill(rng, saving)])
        for family in families:
            family.end()
    total = lambda name: sum(getattr(family, name) for family in families)
    return Summary(
        kills, moments.count("saving"), total("runs"), total("compared"), total("differ")
    )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100, help="Number of processes to kill.")
    parser.add_argument("--seed", type=int, default=0, help="Of the moments.")
    parser.add_argument("--families", default=",".join(FAMILIES))
    options = parser.parse_args(argv)
    names = options.families.split(",")
    if unknown := {*names} - FAMILIES.keys():
        parser.error(f"--families: {', '.join(unknown)} is not among {', '.join(FAMILIES)}")
    with tempfile.TemporaryDirectory() as folder:
        summary = kill_many(options.runs, names, options.seed, pathlib.Path(folder))
    print(summary)
    return 1 if summary.differ else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
