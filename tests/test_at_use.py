"""What may differ when a trained run is used, and scores of rows longer than those of training."""

import json

import numpy as np
import pytest

import genai_jax
from genai_jax import train
from genai_jax.config import ConfigError
from tests.commands import TINY, run

LENGTH, LONG = 16, 64


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, text_folder):
    """A run that was trained on short rows, and scored on long ones."""
    folder = tmp_path_factory.mktemp("at_use") / "run"
    flags = [
        *TINY, f"--data.dataset=text:{text_folder}", f"--data.sequence_length={LENGTH}",
        f"--data.held_out_length={LONG}", "--train.steps=3", "--train.log_every=1",
        "--eval.batches=-1", "--optimizer.learning_rate=0.01", f"--workdir={folder}",
    ]  # fmt: skip
    assert train.main(flags) == 0
    return folder


def test_long_rows_are_scored_by_depth(workdir):
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    opened = genai_jax.load(workdir)
    found = opened.evaluate()
    for name in ("within_16", "after_16", "after_32"):
        name = f"bits_per_byte_{name}"
        assert found[name] == pytest.approx(last[f"eval/{name}"], rel=1e-5)
    bits, size = dict.fromkeys(("within_16", "after_16", "after_32"), 0.0), {}
    for batch in opened.held_out():
        assert batch["tokens"].shape[1] == LONG
        bytes_of = np.asarray(opened.task.data.target_bytes(batch)) * batch["loss_mask"]
        at = batch["positions"]
        for name, low, high in (("within_16", 0, 16), ("after_16", 16, 32), ("after_32", 32, 64)):
            part = (at >= low) & (at < high)
            size[name] = size.get(name, 0) + float(np.sum(bytes_of * part))
    whole = sum(found[f"bits_per_byte_{name}"] * size[name] for name in bits)
    assert sum(size.values()) == found["bytes"]
    assert whole / found["bytes"] == pytest.approx(found["bits_per_byte"], rel=1e-5)


def test_without_longer_rows_there_are_no_depths(workdir):
    short = genai_jax.load(workdir, flags={"data.held_out_length": LENGTH}).evaluate()
    assert not [name for name in short if name.startswith("bits_per_byte_")]
    assert short["flags"] == {"data.held_out_length": LENGTH}


def test_a_window_of_the_whole_row_changes_nothing_and_a_shorter_one_does(workdir):
    plain = genai_jax.load(workdir).evaluate()
    wide = genai_jax.load(workdir, flags={"transformer.window": LONG}).evaluate()
    assert wide["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    narrow = genai_jax.load(workdir, flags={"transformer.window": 2}).evaluate()
    assert abs(narrow["loss"] - plain["loss"]) > 1e-4
    assert narrow["flags"] == {"transformer.window": 2} and "flags" not in plain
    sunk = genai_jax.load(workdir, flags={"transformer.window": 2, "transformer.sinks": 4})
    assert abs(sunk.evaluate()["loss"] - narrow["loss"]) > 1e-4
    alone, both = (
        run.sample(prompt="the cat", temperature=0.0, max_tokens=30, num_samples=1)
        for run in (genai_jax.load(workdir, flags={"transformer.window": 2}), sunk)
    )
    assert alone != both


def test_the_commands_take_what_may_differ(workdir):
    flags = {"transformer.rope_scaling": "ntk", "transformer.rope_factor": 4.0}
    scaled = genai_jax.load(workdir, flags=flags)
    assert scaled.evaluate()["flags"] == flags
    assert scaled.sampled(max_tokens=2, num_samples=1).origin.settings.items() >= flags.items()
    out, _ = run("sample", f"--workdir={workdir}", "--transformer.window=4", "--max_tokens=12",
                 "--transformer.sinks=2", "--num_samples=1")  # fmt: skip
    assert out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"transformer.sinks": 2}, "--transformer.sinks=2 needs a --transformer.window"),
        ({"transformer.rope_factor": 2}, "--transformer.rope_factor=2.0 is not used by"),
        ({"transformer.embed_dim": 8}, "embed_dim"),
    ],
)
def test_what_does_not_fit_a_run_is_refused(workdir, flags, words):
    with pytest.raises(ConfigError, match=words):
        genai_jax.load(workdir, flags=flags)
