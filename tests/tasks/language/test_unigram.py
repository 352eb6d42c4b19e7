"""What a text family gets from the seams: the unigram model is one file and reaches the entropy."""

import collections
import json
import math
import pathlib

import numpy as np
import pytest

from genai_jax import evaluate, sample, train
from genai_jax.components import make_task, parse_run

TASK = "--task=tests.tasks.language.unigram:Unigram"


@pytest.fixture(scope="module")
def run(text_folder, tmp_path_factory):
    flags = [
        TASK, f"--data.dataset=text:{text_folder}", "--data.batch_size=8",
        "--data.sequence_length=64", "--train.steps=150", "--train.progress=false",
        "--optimizer.learning_rate=0.3", "--optimizer.warmup_steps=0", "--optimizer.weight_decay=0",
        "--optimizer.clip_norm=0",
    ]  # fmt: skip
    workdir = tmp_path_factory.mktemp("unigram")
    assert train.main([*flags, f"--workdir={workdir}"]) == 0
    return workdir, make_task(parse_run([*flags]))


def test_it_is_short():
    lines = pathlib.Path(__file__).with_name("unigram.py").read_text().splitlines()
    assert len(lines) <= 120


def test_it_reaches_the_entropy_of_the_held_out_tokens(run, capsys):
    workdir, task = run
    counts = collections.Counter()
    for batch in task.data.held_out(-1):
        counts.update(batch["targets"][batch["loss_mask"] > 0].tolist())
    shares = np.array(list(counts.values())) / counts.total()
    entropy = -float(np.sum(shares * np.log(shares)))
    capsys.readouterr()
    assert evaluate.main([f"--workdir={workdir}", TASK]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert entropy < metrics["loss"] < entropy + 0.05
    # A token of this tokenizer is a byte, but for the ends of documents.
    assert metrics["bits_per_byte"] == pytest.approx(
        metrics["loss"] * metrics["tokens"] / metrics["bytes"] / math.log(2)
    )
    assert metrics["tokens"] == counts.total() and metrics["accuracy"] > 0.1


def test_it_is_sampled_by_the_shared_sampler(run, capsys):
    flags = [f"--workdir={run[0]}", TASK, "--prompt=the ", "--num_samples=2", "--max_tokens=40"]
    assert sample.main(flags) == 0
    printed = capsys.readouterr().out
    assert printed.count("the ") >= 2
    letters = set(printed.replace("--- sample 1 of 2", "").replace("--- sample 2 of 2", ""))
    assert letters <= set(
        "the cat saw a red fox near my old barn and it ran home over wet grass.\n"
    )
